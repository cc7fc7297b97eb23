"""A run that is killed at any write of its end: a resume makes the parts that lack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.faults import write_fails
from support.runs import board, records, run

from minidistill.driver import loop, session, summary
from minidistill.errors import EXIT_OK

BRIEF = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
BRIEF += ("--max_steps", "1", "--orchestrator.batch_size", "4")
ADAPTER = "adapter/adapter_model.safetensors"
STRIDE = 2
"""Each second write, for the sake of time; 1 tries all of them in 27 s."""


class Summaries:
    """A monitor that keeps the scoreboards that it is sent."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, Any]] = []

    def log(self, step: int, metrics: Any) -> None:
        pass

    def samples(self, step: int, rows: Any) -> None:
        pass

    def close(self, board: Mapping[str, Any] | None) -> None:
        if board is not None:
            self.sent.append(board)


def test_a_run_that_is_killed_at_any_write_of_its_end_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at the first write, resumed and killed at a later one, and so on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes much of the time
    whole, path, monitor = tmp_path / "whole", tmp_path / "run", Summaries()
    for module in (session, summary):
        monkeypatch.setattr(module, "open_monitors", lambda *args: monitor)
    assert run(whole, *BRIEF) == EXIT_OK
    assert [sent["steps"] for sent in monitor.sent] == [1]
    monitor.sent.clear()
    capsys.readouterr()

    finish, show_finished = loop.finish, loop.show_finished
    struck: list[str] = []
    resume: list[str] = []
    for number in range(1, 100, STRIDE):
        with write_fails(path, 0, kills=True) as fault, monkeypatch.context() as patch:

            def finishes(*args: Any, fault: Any = fault, number: int = number) -> None:
                fault.at = fault.writes + number
                finish(*args)

            def shows(*args: Any, fault: Any = fault, number: int = number) -> bool:
                fault.at = fault.writes + number
                finished = show_finished(*args)
                fault.at = 0  # the steps of a resume are not the end
                return finished

            patch.setattr(loop, "finish", finishes)
            patch.setattr(loop, "show_finished", shows)
            code = None
            code = run(path, *BRIEF, *resume)
        output, resume = capsys.readouterr().out, ["--resume"]
        if code is not None:
            assert code == EXIT_OK
            break
        struck.append(fault.log[fault.at - 1])
        assert "already finished" not in output
    assert any("adapter" in write for write in struck)
    assert any("scoreboard.json" in write for write in struck)
    assert len(struck) >= 15 // STRIDE, struck
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    assert "already finished" in capsys.readouterr().out
    assert [sent["steps"] for sent in monitor.sent] != []
    assert_whole(path, whole)


def assert_whole(path: Path, whole: Path) -> None:
    """All parts are there, and equal those of the undisturbed run."""
    assert board(path) == board(whole)
    assert records(path) == records(whole)
    ours, theirs = load_file(path / ADAPTER), load_file(whole / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    assert (path / "report.html").stat().st_size > 1000
    assert not list(path.rglob("*.tmp"))
    listed = [line.split("  ")[1] for line in (path / "SHA256SUMS").read_text().splitlines()]
    assert listed == [
        "env.json", "rollouts/step_000001.jsonl", "rollouts/step_000001.safetensors",
        "adapter/adapter_config.json", ADAPTER, "metrics.jsonl", "scoreboard.json",
    ]  # fmt: skip
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=path)
    assert done.returncode == 0


@pytest.mark.parametrize("part", ["report.html", "scoreboard.json", ADAPTER, "the summary"])
def test_a_part_that_is_lost_is_made_again(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    monitor = Summaries()
    for module in (session, summary):
        monkeypatch.setattr(module, "open_monitors", lambda *args: monitor)
    whole = tmp_path_factory.getbasetemp() / "whole"
    if not whole.exists():
        assert run(whole, *BRIEF) == EXIT_OK
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    monitor.sent.clear()
    if part == "the summary":  # as a run that was killed while its monitor was closing
        sums = path / "SHA256SUMS"
        sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:-2]))
    else:
        (path / part).unlink()
    capsys.readouterr()
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    output = capsys.readouterr().out
    assert ("already finished" in output) == (part in ("report.html", "the summary"))
    assert len(monitor.sent) == (0 if part == "report.html" else 1)
    if part == ADAPTER:
        assert f"{ADAPTER} is missing: the run's end is repeated" in output
    assert json.loads((path / "scoreboard.json").read_text())["steps"] == 1
    assert_whole(path, whole)
