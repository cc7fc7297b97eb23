"""Runs on the shipped model, in this process or in a subprocess that can be killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from minidistill import cli
from minidistill.config import load_config
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from support import processes
from support.gpus import REHEARSED
from support.paths import SOKOBAN
from support.processes import Started

# A run of a few seconds: few puzzles, few rollouts, every feature enabled
TINY = (
    "--max_steps", "6", "--ckpt.interval", "2",
    "--orchestrator.batch_size", "8",
    "--orchestrator.eval.num_examples", "8", "--orchestrator.eval.interval", "3",
    "--orchestrator.env.0.args.num_train_examples", "16",
    "--orchestrator.env.0.args.num_eval_examples", "8",
)  # fmt: skip


def run(path: Path, *flags: str) -> int:
    """A tiny run in this process. Returns the exit code."""
    return cli.main(["run", SOKOBAN, *TINY, "--output_dir", str(path), *flags])


def plan_on_gpus(*flags: str) -> None:
    """Plan a run on a machine with two GPUs: read every flag and refuse what a run would refuse."""
    machine = Machine(gpus=2, bytes=80 * GIB, vllm=True, bf16=True, bitsandbytes=True)
    assert plan_run(load_config([SOKOBAN, *flags]), machine).placement.trainer_gpus


def run_on_gpus(path: Path, flags: tuple[str, ...], rehearsal: tuple[str, ...]) -> int:
    """A run in this process for a GPU test, without `TINY`. Returns the exit code.

    Without a GPU it is planned for one, and then runs on the CPU with `rehearsal` in place of
    `flags`.
    """
    if REHEARSED:
        plan_on_gpus(*flags)
    chosen = rehearsal if REHEARSED else flags
    return cli.main(["run", SOKOBAN, *chosen, "--output_dir", str(path)])


def command(path: Path, *flags: str) -> list[str]:
    """The command line of a tiny run."""
    program = [sys.executable, "-m", "minidistill"]
    return [*program, "run", SOKOBAN, *TINY, "--output_dir", str(path), *flags]


def start(path: Path, *flags: str, as_users_do: bool = False, **environment: str) -> Started:
    """A tiny run in a subprocess."""
    return processes.start(command(path, *flags), as_users_do=as_users_do, **environment)


def records(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    ]


def board(path: Path) -> dict[str, Any]:
    """scoreboard.json without timings."""
    scoreboard = json.loads((path / "scoreboard.json").read_text())
    return {k: v for k, v in scoreboard.items() if k != "seconds"}


def assert_gap_closed(board: dict[str, Any]) -> None:
    assert board["eval_tasks"] >= 256
    assert board["baseline_diff"] >= 0.5
    assert board["gap_closed"] >= 0.9
    assert board["gap_closed_low"] >= 0.8
    assert board["teacher_kl_last"] <= 0.1 * board["teacher_kl_first"]
    assert board["heldout_kl_after"] <= 0.1 * board["heldout_kl_before"]
