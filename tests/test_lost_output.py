"""The reader of the output goes away: a run goes on, and exit codes stay what they are."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.runs import board, command

from minidistill import logs
from minidistill.cli import main
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, EXIT_OK, EXIT_USAGE
from minidistill.reporting.terminal import lasting_output, open_display
from minidistill.system.files import drop_output

BRIEF = (
    "--max_steps", "2", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
)  # fmt: skip


def start(path: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """A tiny run as users start it, because what it cannot write shows as the interpreter ends."""
    return subprocess.Popen(
        command(path, *BRIEF, *flags),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


def leave(path: Path) -> int:
    """Start a run, read its first line only, and return its exit code."""
    process = start(path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process.wait(timeout=120)


def test_a_run_goes_on_to_its_end(tmp_path: Path) -> None:
    assert leave(tmp_path / "run") == EXIT_OK
    assert board(tmp_path / "run")["steps"] == 2
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert log.count("the output cannot be written (Broken pipe)") == 1


def test_a_run_that_fails_has_its_own_exit_code(tmp_path: Path) -> None:
    env = "--orchestrator.env.0"
    broken = (f"{env}.id", "support.broken_envs:crashing", f"{env}.args.every", "1")
    environment = {"PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])}
    process = start(tmp_path / "run", *broken, **environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == EXIT_HEALTH


def test_an_error_that_nobody_reads_has_its_exit_code(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "minidistill", "config", "missing.toml"]
    try:
        done = subprocess.run(argv, stdout=write, stderr=write, timeout=60)
    finally:
        os.close(write)
    assert done.returncode == EXIT_USAGE


@pytest.mark.parametrize("live", [False, True])
def test_a_display_without_a_reader(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    read, write = os.pipe()

    class Stream:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.file = os.fdopen(write, "w")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def isatty(self) -> bool:
            return live

    stream: Any = Stream()
    display = open_display(stream)
    with logs.to_file(tmp_path / "run.log"):
        display.note("read")
        stream.flush()
        assert os.read(read, 100).startswith(b"read")
        os.close(read)
        for text in ("lost", "dropped"):
            display.note(text, warning=True)
        with display.phase("sample", 3, "rollouts") as advance:
            advance(3)
    display.close()
    stream.file.close()
    assert (tmp_path / "run.log").read_text().count("from here on it is dropped") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_an_old_encoding_lacks_is_no_lost_reader(encoding: str, tmp_path: Path) -> None:
    """An environment prints an arrow: what is printed after it is there."""
    file = tmp_path / "output"
    with (
        open(file, "w", encoding=encoding) as stream,
        contextlib.redirect_stdout(stream),
        lasting_output(),
    ):
        print("a → b 漢")
        print("after")
    assert file.read_text(encoding=encoding) == "a -> b ?\nafter\n"


def test_dropping_output_leaves_no_descriptor(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as stream:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            drop_output(stream)
        stream.write("lost")
        stream.flush()
        assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("command", [["config", "sokoban"], ["plan", "sokoban"], ["--help"]])
def test_commands_whose_output_is_lost(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for broken, code in (("/dev/full", EXIT_ENVIRONMENT), ("", EXIT_OK)):
        if broken:
            number = os.open(broken, os.O_WRONLY)
        else:
            read, number = os.pipe()
            os.close(read)
        with os.fdopen(number, "w", encoding="ascii") as stream:
            monkeypatch.setattr("sys.stdout", stream)
            assert main(command) == code
        # nothing is left that would fail as the stream is closed
    assert capsys.readouterr().err.count("cannot") == 1


def test_a_terminal_with_an_old_encoding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["config", "sokoban"]) == EXIT_OK
    assert capsys.readouterr().err == ""
