"""Temporary folders and shared memory of processes that were killed, and of those that live."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

from minidistill.engines.vllm import client
from minidistill.engines.vllm.client import EngineDied, EngineProcess
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.scratch import ScratchFolder, sweep


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, which is empty. Its path is short, as sockets need it."""
    path = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    shutil.rmtree(path)


@contextmanager
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path, list[Path]]]:
    """A process with a scratch folder, and its segments: shared memory and a semaphore."""
    paths = os.pathsep.join(map(str, (TESTS, ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "support.dying"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            folder, *names = process.stdout.readline().split()
            yield process, Path(folder), [Path("/dev/shm", name) for name in names]
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_and_a_live_one_keeps_its_own(
    temporary: Path,
) -> None:
    mine = ScratchFolder()
    with owner(temporary) as (process, folder, segments):
        sweep()
        assert {mine.path, folder} <= set(temporary.iterdir())
        assert all(segment.exists() for segment in segments)
        process.kill()
        process.wait()
        assert folder.exists()
        assert all(segment.exists() for segment in segments)
        sweep()
        assert not folder.exists()
        assert not [segment for segment in segments if segment.exists()]
        other = segments[0].with_name(f"other_{process.pid}")
        assert other.exists(), "a program that is not ours may share it"
        other.unlink()
    assert mine.path.exists()
    mine.close()
    assert not mine.path.exists()
    mine.close()


def test_nothing_else_is_removed(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = ScratchFolder()
    prefix = dead.path.name.rpartition("-")[0]
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (temporary / f"{prefix}-link").symlink_to("elsewhere")
    (temporary / f"{prefix}-file").write_text("mine")
    os.mkfifo(temporary / f"{prefix}-pipe")
    (temporary / "minidistill-00000000-12345678").mkdir()  # another host's
    (temporary / "minidistill-abcdefgh").mkdir()  # of a version without locks
    (dead.path / "link").symlink_to(elsewhere)
    before = set(temporary.iterdir())
    names = ["../../etc/passwd", "/etc/passwd", "psm_../x", "other", "psm_gone", 7, None]
    (dead.path / "shared_memory.json").write_text(
        str(names).replace("'", '"').replace("None", "null")
    )
    sweep()
    assert set(temporary.iterdir()) == before
    user = os.geteuid()
    assert dead._lock is not None
    os.close(dead._lock)  # as the kernel does
    dead._lock = None
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)  # another user
        sweep()
    assert set(temporary.iterdir()) == before
    sweep()
    assert set(temporary.iterdir()) == before - {dead.path}
    assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "{}", "[[]]", '"psm_x"', "\xff", "null", "7"])
def test_a_damaged_list_of_segments_keeps_nothing_from_being_removed(
    temporary: Path, text: str
) -> None:
    dead = ScratchFolder()
    (dead.path / "shared_memory.json").write_text(text)
    assert dead._lock is not None
    os.close(dead._lock)
    dead._lock = None
    sweep()
    assert not dead.path.exists()


def test_starts_that_sweep_at_the_same_time(temporary: Path) -> None:
    """Folders of the living stay, whenever another start looks at them."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def sweep_all_the_time() -> None:
        while not ended.is_set():
            sweep()

    def start() -> None:
        try:
            for _ in range(150):
                folder = ScratchFolder()
                (folder.path / "file").write_text("x")
                assert (folder.path / "file").read_text() == "x"
                folder.close()
        except BaseException as error:
            failures.append(error)

    sweepers = [threading.Thread(target=sweep_all_the_time) for _ in range(2)]
    starts = [threading.Thread(target=start) for _ in range(4)]
    for thread in (*sweepers, *starts):
        thread.start()
    for thread in starts:
        thread.join()
    ended.set()
    for thread in sweepers:
        thread.join()
    assert failures == []
    assert list(temporary.iterdir()) == []


def test_a_fork_does_not_remove_its_parents_folder(temporary: Path) -> None:
    folder = ScratchFolder()
    child = os.fork()
    if child == 0:
        folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.exists()
    folder.close()


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot write") as caught:
        ScratchFolder()
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    sweep()


def test_a_file_system_without_locks(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder can be proven to be left over there."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = ScratchFolder()
    sweep()
    assert folder.path.exists()
    folder.close()
    assert list(temporary.iterdir()) == []


def test_an_engines_process_leaves_nothing(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is closed, nor after it has died."""
    monkeypatch.setattr(client, "MODULE", "support.dying")
    monkeypatch.setattr(client, "use_for_multiprocessing", lambda: None)  # as long as this process
    monkeypatch.setattr("minidistill.system.subprocesses.Popen", subprocess.Popen)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, ROOT, ROOT / "kernels"))))
    shared = {path.name for path in Path("/dev/shm").glob("psm_*")}
    with ExitStack() as stack:
        for died in (False, True):
            process = EngineProcess({}, {})
            stack.callback(process.close)
            process.wait_until_started()
            folder = process._scratch.path
            assert folder.parent == temporary
            assert [p for p in folder.iterdir() if p.is_dir()], "its temporary files are there"
            left = {path.name for path in Path("/dev/shm").glob("psm_*")} - shared
            assert left
            if died:
                process.kill()
                with pytest.raises(EngineDied):
                    process.call("anything")
            process.close()
            assert not folder.exists()
            assert not left & {path.name for path in Path("/dev/shm").glob("psm_*")}


def test_the_sockets_of_multiprocessing_are_in_a_scratch_folder(temporary: Path) -> None:
    command = (
        "import multiprocessing.util as util; from minidistill.system.scratch import *;"
        "use_for_multiprocessing(); use_for_multiprocessing(); print(util.get_temp_dir());"
        "from multiprocessing.connection import Listener; kept = Listener(family='AF_UNIX')"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    ended = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    assert Path(ended.stdout.strip()).parent == temporary
    assert Path(ended.stdout.strip()).name.startswith("minidistill-")
    assert list(temporary.iterdir()) == []


def test_a_path_that_is_too_long_for_sockets(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ScratchFolder().holds_sockets
    (temporary / ("x" * 60)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("x" * 60)))
    assert not ScratchFolder().holds_sockets
