"""A run's directory has one owner, which a second start or resume does not disturb."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Barrier

import pytest
from support.configs import MINIMAL
from support.runs import run

from minidistill.config import LoadedConfig, load_config
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.reporting import run_path
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.run_lock import LOCK, locked, release_all
from minidistill.reporting.run_path import claim_path


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedConfig]:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(MINIMAL)
    return lambda *flags: load_config(["a.toml", *flags])


def test_runs_that_start_at_once_have_a_directory_each(load: Callable[..., LoadedConfig]) -> None:
    starts = 8
    loaded, all_hold_one = load(), Barrier(starts)

    def start(number: int) -> Path:
        with claim_path(loaded, resume=False) as path:
            all_hold_one.wait(20)
            RunDirectory(path).create(loaded, {"number": number})
            return path

    with ThreadPoolExecutor(starts) as pool:
        paths = list(pool.map(start, range(starts)))
    assert {p.parent for p in paths} == {Path("runs").absolute()}
    assert {p.name for p in paths} == {"a", *(f"a-{n}" for n in range(2, starts + 1))}
    for number, path in enumerate(paths):
        assert RunDirectory(path).read("env.json")["number"] == number
        assert not (path / LOCK).exists()


def test_neither_a_link_that_changes_nor_another_current_directory_leads_elsewhere(
    load: Callable[..., LoadedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment may change the current directory, and a user the link to the latest run."""
    loaded = load("--output_dir", "latest")
    for name in ("real", "other"):
        Path(name).mkdir()
    Path("latest").symlink_to("real")
    with claim_path(loaded, resume=False) as path:
        Path("latest").unlink()
        Path("latest").symlink_to("other")
        monkeypatch.chdir("/")
        RunDirectory(path).create(loaded, {})
    assert (tmp_path / "real/config.resolved.json").exists()
    assert not (tmp_path / "real" / LOCK).exists()
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("resume", [False, True], ids=["start", "resume"])
def test_a_directory_in_use_is_refused(load: Callable[..., LoadedConfig], resume: bool) -> None:
    loaded = load("--output_dir", "out")
    if resume:
        RunDirectory(Path("out")).create(loaded, {})
    with claim_path(loaded, resume), pytest.raises(UserError) as caught, ExitStack() as stack:
        stack.enter_context(claim_path(loaded, resume))
    assert caught.value.exit_code == EXIT_USAGE
    assert f"out is in use by another run (process {os.getpid()} on " in caught.value.what
    with claim_path(loaded, resume):
        pass


def test_a_run_does_not_start_in_a_directory_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "run"):
        assert run(tmp_path / "run") == EXIT_USAGE
        assert "is in use by another run" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]


def test_the_lock_ends_with_its_process(load: Callable[..., LoadedConfig], tmp_path: Path) -> None:
    """Killed before the run began, it leaves a directory that the next run takes."""
    program = """
import sys, time
from pathlib import Path
from minidistill.reporting.run_lock import locked
with locked(Path("runs/a")):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with claim_path(load(), resume=False) as path:
            assert path == tmp_path / "runs/a-2"
        holder.send_signal(signal.SIGKILL)
    with claim_path(load(), resume=False) as path:
        assert path == tmp_path / "runs/a"


def test_a_run_that_does_not_begin_leaves_nothing(load: Callable[..., LoadedConfig]) -> None:
    with claim_path(load(), resume=False) as path:
        assert path.is_dir()
    assert not Path("runs").exists()


def test_a_lock_is_not_written_through_a_link(load: Callable[..., LoadedConfig]) -> None:
    Path("out").mkdir()
    Path("precious").write_text("kept")
    (Path("out") / LOCK).symlink_to("../precious")
    with pytest.raises(UserError, match="cannot be written"), ExitStack() as stack:
        stack.enter_context(claim_path(load("--output_dir", "out"), resume=False))
    assert Path("precious").read_text() == "kept"


def test_a_number_at_which_a_run_has_just_ended_is_passed_over(
    load: Callable[..., LoadedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins and ends between the choice of a number and its lock."""
    begun: list[Path] = []

    @contextmanager
    def locked_late(path: Path) -> Iterator[None]:
        if not begun:
            begun.append(path)
            RunDirectory(path).create(load(), {"number": 1})
        with locked(path):
            yield

    monkeypatch.setattr(run_path, "locked", locked_late)
    with claim_path(load(), resume=False) as path:
        assert (begun, path) == ([Path("runs/a").absolute()], Path("runs/a-2").absolute())
    assert RunDirectory(Path("runs/a")).read("env.json")["number"] == 1
    begun.clear()
    with pytest.raises(UserError, match="already holds a run"), ExitStack() as stack:
        stack.enter_context(claim_path(load("--output_dir", "out"), resume=False))


@pytest.mark.parametrize("resumes", [(False, False), (False, True), (True, True)])
def test_of_two_that_begin_at_once_one_runs(
    load: Callable[..., LoadedConfig], resumes: tuple[bool, bool]
) -> None:
    loaded = load("--output_dir", "out")
    if any(resumes):
        RunDirectory(Path("out")).create(loaded, {})
    for _ in range(10):
        barrier, tried = Barrier(2), Barrier(2)

        def begin(resume: bool, barrier: Barrier = barrier, tried: Barrier = tried) -> int:
            barrier.wait(20)
            try:
                with claim_path(loaded, resume):
                    tried.wait(20)
                    return 0
            except UserError as error:
                tried.wait(20)
                return error.exit_code

        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(begin, resumes))
        assert sorted(codes) == [0, EXIT_USAGE]
        if resumes == (False, True):
            assert codes == [EXIT_USAGE, 0]  # there is a run already


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    """An environment's worker may outlive a run that is killed."""
    (reader, writer), (began, begins) = os.pipe(), os.pipe()
    with locked(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os.write(begins, b"x")
            os.read(reader, 1)  # until the test ends
            os._exit(0)
        os.read(began, 1)
        try:
            release_all()  # the run is killed
            assert (tmp_path / "run" / LOCK).exists()
            with locked(tmp_path / "run"):
                pass
        finally:
            os.write(writer, b"x")
            os.waitpid(child, 0)
            for end in (reader, writer, began, begins):
                os.close(end)


def test_without_locks_a_directory_is_held_on_this_machine(
    load: Callable[..., LoadedConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flock = fcntl.flock

    def without_locks(descriptor: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(tmp_path / "out")):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(descriptor, operation)

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(fcntl, "flock", without_locks)
    loaded = load("--output_dir", "out")
    with claim_path(loaded, resume=False):
        assert "out is on a file system without locks (No locks available)" in caplog.text
        assert len(list(temporary.iterdir())) == 1
        Path("alias").symlink_to("out")
        for name in ("out", "alias"):
            claim = claim_path(load("--output_dir", name), resume=False)
            with pytest.raises(UserError, match=f"in use by another run .process {os.getpid()} "):
                claim.__enter__()
    assert not list(temporary.iterdir())
    assert not Path("out").exists()
    with claim_path(loaded, resume=False):
        pass
