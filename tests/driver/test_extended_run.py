"""A finished run: resumed as it is, with other settings, and with more steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.runs import board, records, run

from minidistill.driver import loop
from minidistill.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from minidistill.reporting.html import has_report

CONSTANT = ("--trainer.scheduler.type", "constant", "--trainer.scheduler.warmup_steps", "2")
ADAPTER = Path("adapter/adapter_model.safetensors")


def contents(path: Path) -> dict[Path, bytes]:
    """Every file of a run except its log."""
    files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".log")
    return {file: file.read_bytes() for file in files}


def test_an_extended_run_is_the_run_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation due at step 3 is the shorter run's last one. The extension is cut off once."""
    whole, path = tmp_path / "whole", tmp_path / "extended"
    assert run(whole, *CONSTANT) == EXIT_OK
    assert run(path, *CONSTANT, "--max_steps", "3") == EXIT_OK
    finished = contents(path)
    capsys.readouterr()

    assert run(path, *CONSTANT, "--max_steps", "3", "--resume") == EXIT_OK
    assert "is already finished: 3 steps" in capsys.readouterr().out
    assert run(path, *CONSTANT, "--trainer.optim.lr", "5e-3", "--resume") == EXIT_USAGE
    assert "trainer.optim.lr (was 0.002, now 0.005)" in capsys.readouterr().err
    assert run(path, *CONSTANT, "--max_steps", "2", "--resume") == EXIT_USAGE
    assert "cannot be lowered to 2" in capsys.readouterr().err
    assert contents(path) == finished

    (path / "report.html").unlink()
    (path / "report.html").mkdir()  # in the way
    original = loop.train_step

    def breaks_at_5(session: Any, step: int) -> None:
        if step == 5:
            raise RuntimeError("it broke")
        original(session, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", breaks_at_5)
        assert run(path, *CONSTANT, "--resume") == EXIT_FAILED
    assert not (path / "scoreboard.json").exists(), "of the shorter run"
    assert not has_report(path), "of the shorter run"
    assert json.loads((path / "config.resolved.json").read_text())["max_steps"] == 6
    assert run(path, *CONSTANT, "--resume") == EXIT_OK
    assert records(path) == records(whole)
    assert board(path) == board(whole)
    ours, theirs = load_file(path / ADAPTER), load_file(whole / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in theirs)
