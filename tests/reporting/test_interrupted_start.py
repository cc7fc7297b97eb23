"""A start that is cut off at any of its writes leaves a directory in which a run can start."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.configs import MINIMAL
from support.faults import Killed, write_fails

from minidistill.config import LoadedConfig, load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.run_lock import LOCK
from minidistill.reporting.run_path import choose_path, claim_path

Load = Callable[..., LoadedConfig]
FILES = ["SHA256SUMS", "config.resolved.json", "config.toml", "env.json"]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes most of the time
    Path("a.toml").write_text(MINIMAL)
    return lambda *flags: load_config(["a.toml", *flags])


def start(loaded: LoadedConfig) -> Path:
    """What a start writes before its first step, with a line in the log."""
    with claim_path(loaded, resume=False) as path:
        directory = RunDirectory(path)
        directory.create(loaded, {"tasks": "some"})
        with contextlib.suppress(OSError):
            directory.log_path.write_text("started\n")
    return path


def entries(path: Path) -> list[str]:
    files = (p for p in path.rglob("*") if p.is_file() and p.name != LOCK)
    return sorted(str(p.relative_to(path)) for p in files)


def writes_of_a_start(load: Load) -> list[str]:
    with write_fails(Path("whole"), 0, kills=False) as fault:
        start(load("--output_dir", "whole"))
    return fault.log


@pytest.mark.parametrize("numbered", [False, True], ids=["output_dir", "numbered"])
def test_a_start_that_is_killed_at_any_write_can_be_started_again(
    load: Load, numbered: bool
) -> None:
    writes = writes_of_a_start(load)
    assert len(writes) >= 14  # a lock, three folders, four files of up to three writes
    begun = 0
    for at in range(1, len(writes) + 1):
        name = "runs/a" if numbered else f"out-{at}"
        loaded = load() if numbered else load("--output_dir", name)
        path = Path(f"runs/a-{begun + 1}" if begun else "runs/a") if numbered else Path(name)
        with write_fails(path.parent if numbered else path, at, kills=True):
            start(loaded)
        if (path / "config.resolved.json").exists():  # it is a run, which can be resumed
            begun += 1
            with claim_path(loaded, resume=True) as resumed:
                assert resumed == path.absolute()
            assert entries(path)[:4] == FILES
            continue
        with pytest.raises(UserError, match="no run to resume") as caught:
            choose_path(load("--output_dir", str(path)), resume=True)
        assert "leave out --resume" in caught.value.fix
        if not numbered:
            assert start(loaded) == path.absolute()
            assert entries(path) == [*FILES, "logs/run.log"]
    assert begun >= 2
    if numbered:  # no number was lost, and no folder without a run is left
        start(load())
        assert len(list(Path("runs").iterdir())) == begun + 1


def test_a_start_that_fails_at_any_write_leaves_nothing(load: Load) -> None:
    last = 1 + writes_of_a_start(load).index("os.rename config.resolved.json")
    for at in range(1, last + 1):
        loaded = load("--output_dir", f"out-{at}")
        with write_fails(Path(f"out-{at}"), at, kills=False), pytest.raises(UserError) as caught:
            start(loaded)
        assert not Path(f"out-{at}").exists(), at
        assert caught.value.exit_code in (EXIT_USAGE, EXIT_ENVIRONMENT)
        assert "No space left" in caught.value.what


def test_a_start_that_is_killed_while_it_clears_another_can_be_started_again(load: Load) -> None:
    loaded, writes = load("--output_dir", "out"), writes_of_a_start(load)
    with write_fails(Path("out"), 1 + writes.index("open SHA256SUMS"), kills=True):
        start(loaded)
    assert {"env.json", "config.toml"} <= set(entries(Path("out")))
    for at in range(1, writes.index("os.rename config.resolved.json")):
        with write_fails(Path("out"), at, kills=True):
            start(loaded)
        assert not Path("out/config.resolved.json").exists()
    start(loaded)
    assert entries(Path("out")) == [*FILES, "logs/run.log"]


@pytest.mark.parametrize(
    "names",
    [
        ["config.toml"],
        ["config.toml", LOCK],
        ["checkpoints/", "rollouts/", "logs/"],
        ["checkpoints/", "rollouts/", "logs/", "notes.txt", LOCK],
        ["checkpoints/step_000001/", "rollouts/", "logs/", LOCK],
        ["logs/notes.txt", "checkpoints/", "rollouts/", LOCK],
        ["metrics.jsonl", LOCK],
    ],
)
def test_other_files_are_left_alone(load: Load, names: list[str]) -> None:
    for name in names:
        path = Path("out", name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("mine")
    before = sorted(Path("out").rglob("*"))
    with pytest.raises(UserError, match="exists and is not empty"):
        start(load("--output_dir", "out"))
    assert sorted(Path("out").rglob("*")) == before


def test_a_link_in_place_of_what_a_start_made_is_not_followed(load: Load) -> None:
    Path("precious").mkdir()
    Path("precious/kept").write_text("kept")
    Path("out").mkdir()
    for name in ("checkpoints", "logs"):
        Path("out", name).mkdir()
    Path("out", LOCK).write_text("")
    Path("out/rollouts").symlink_to("../precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        start(load("--output_dir", "out"))
    assert Path("precious/kept").read_text() == "kept"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "rollouts", "checkpoints", "logs/run.log", "SHA256SUMS", "adapter"]
)
def test_a_resume_does_not_write_through_a_link(load: Load, name: str) -> None:
    path = start(load("--output_dir", "out"))
    link = path / name
    if link.is_dir():
        link.rmdir()
    link.unlink(missing_ok=True)
    link.symlink_to("/tmp/elsewhere")
    loaded = load("--output_dir", "out")
    with pytest.raises(UserError, match="symbolic link") as caught, claim_path(loaded, resume=True):
        pass
    assert caught.value.where == str(link)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert not (path / LOCK).exists()


def test_the_directory_itself_may_be_a_link(load: Load) -> None:
    Path("big-disk").mkdir()
    Path("out").symlink_to("big-disk")
    start(load("--output_dir", "out"))
    assert entries(Path("big-disk")) == [*FILES, "logs/run.log"]
    with claim_path(load("--output_dir", "out"), resume=True):
        assert (Path("big-disk") / LOCK).exists()


def test_the_injected_faults_are_real(tmp_path: Path) -> None:
    """A kill lets nothing more through; a full disk stops one write."""
    with write_fails(tmp_path, 2, kills=True):
        (tmp_path / "one").write_text("1")
        try:
            (tmp_path / "two").write_text("2")
        except Killed:
            (tmp_path / "three").write_text("3")
    with write_fails(tmp_path, 2, kills=False):
        (tmp_path / "four").write_text("4")
        with pytest.raises(OSError, match="space") as caught:
            (tmp_path / "five").mkdir()
        (tmp_path / "six").mkdir()
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["four", "one", "six"]
