"""Ranks that are killed or fail: one error, no hang, and no process left over."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.runs import run, start

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_INTERRUPTED
from minidistill.trainer.distributed import launcher

TWO = ("--trainer.world_size", "2")
BRIEF = (
    "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.eval.interval", "0",
    "--trainer.scheduler.decay_steps", "6",
)  # fmt: skip


def children(pid: int) -> list[int]:
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    module = launcher.MODULE.encode()
    return [int(p) for p in pids if module in Path(f"/proc/{p}/cmdline").read_bytes()]


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        ("rank", signal.SIGKILL, EXIT_FAILED),
        ("driver", signal.SIGKILL, -signal.SIGKILL),
        ("driver", signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_a_killed_process_ends_the_run_and_leaves_none(
    tmp_path: Path, whom: str, number: int, code: int
) -> None:
    path = tmp_path / "run"
    size = 3 if whom == "rank" else 2
    flags = ("--max_steps", "400", "--orchestrator.batch_size", "12", "--trainer.shard")
    process = start(path, *BRIEF, *flags, "--trainer.world_size", str(size))
    metrics = path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and b'"step": 2,' in metrics.read_bytes())
    ranks = children(process.pid)
    assert len(ranks) == size - 1
    os.kill(ranks[0] if whom == "rank" else process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert ("rank 1 of the trainer ended: signal SIGKILL" in output) == (whom == "rank")
    wait_for(lambda: all(map(gone, ranks)), 10)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("error", EXIT_FAILED, "exit code 1; last output: ValueError: no such layer"),
        ("memory", EXIT_ENVIRONMENT, "one sequence of"),
    ],
)
def test_an_error_in_a_rank_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, fault: str, code: int, words: str
) -> None:
    monkeypatch.setattr(launcher, "MODULE", "support.broken_rank")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), *sys.path]))
    monkeypatch.setenv("FAULT", fault)
    assert run(tmp_path / "run", *TWO, *BRIEF, "--trainer.micro_batch_tokens", "9") == code
    error = capfd.readouterr().err
    assert "rank 1 of the trainer ended" in error
    assert words in error
    assert not torch.distributed.is_initialized()
