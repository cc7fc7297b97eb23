"""The shipped experiment, whole: what the README promises, and its control.

The mode without rewards is tested in tests/engines/vllm/test_vllm_results.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, SOKOBAN
from support.runs import assert_gap_closed

from minidistill import cli


def scoreboard(path: Path, *argv: str) -> dict[str, Any]:
    assert cli.main(["run", SOKOBAN, *argv, "--output_dir", str(path)]) == 0
    return json.loads((path / "scoreboard.json").read_text())


# As many tasks as the targets ask for, and no evaluation in between
TASKS = ("--orchestrator.eval.num_examples", "256", "--orchestrator.eval.interval", "0")


@pytest.mark.slow
def test_hybrid(tmp_path: Path) -> None:
    assert_gap_closed(scoreboard(tmp_path / "hybrid", *TASKS))


@pytest.mark.slow
def test_a_placebo_closes_nothing(tmp_path: Path) -> None:
    placebo = str(ROOT / "configs" / "overlays" / "placebo.toml")
    fewer = (*TASKS, "--orchestrator.eval.num_examples", "128", "--max_steps", "30")
    board = scoreboard(tmp_path / "null", "@", placebo, *fewer)
    assert abs(board["baseline_diff"]) < 0.05
    assert board["gap_closed"] is None
    assert "no gap" in board["verdict"]
    assert board["student"] < 0.25, "it learned to play from a text about the weather"
