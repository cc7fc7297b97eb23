"""A run's directory has one owner, which a second start or resume does not disturb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest
from support.configs import MINIMAL
from support.runs import run

from minidistill.config import LoadedConfig, load_config
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.run_lock import LOCK, locked
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
    assert {str(p) for p in paths} == {"runs/a", *(f"runs/a-{n}" for n in range(2, starts + 1))}
    for number, path in enumerate(paths):
        assert RunDirectory(path).read("env.json")["number"] == number
        assert not (path / LOCK).exists()


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
            assert path == Path("runs/a-2")
        holder.send_signal(signal.SIGKILL)
    with claim_path(load(), resume=False) as path:
        assert path == Path("runs/a")


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
