"""Trainers with several ranks on a CPU, and comparisons with a trainer of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from minidistill.config import LoadedConfig
from minidistill.trainer.distributed.launcher import RankLauncher
from minidistill.types import Rollout
from support.lab import NO_MISMATCH_LIMIT, SMALL_STEP, Lab, cpu_placement, make_lab

TWO_RANKS = ("--trainer.world_size", "2")
ALL_WEIGHTS = ("--no-trainer.model.lora", "--trainer.optim.lr", "5e-4")
# Several micro-batches, and training on the same rollouts again
SMALL = (*SMALL_STEP, "--trainer.micro_batch_tokens", "700", *NO_MISMATCH_LIMIT)
# Of a whole run: neither baseline nor evaluation
NO_EVALUATION = (
    "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.eval.interval", "0",
    "--trainer.scheduler.decay_steps", "6",
)  # fmt: skip


@contextmanager
def ranked_lab(loaded: LoadedConfig, rollouts: list[Rollout] | None = None) -> Iterator[Lab]:
    """A lab whose trainer is the driver of the configured number of ranks."""
    placement = cpu_placement(loaded)
    launcher = RankLauncher(placement.devices)
    try:
        launcher.start(loaded.config, placement)
        lab = make_lab(loaded, trained=False, rank_group=launcher.group)
        lab.rollouts = rollouts or lab.rollouts
        yield lab
    finally:
        launcher.close()


def train(lab: Lab, count: int, first: int = 1) -> list[dict[str, float]]:
    """Take `count` steps on the lab's rollouts. Returns their metrics without timings."""
    records = []
    for step in range(first, first + count):
        metrics = lab.trainer.step(lab.rollouts, step, lambda n: None).metrics
        records.append({k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))})
    return records


def assert_close(records: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Equal up to float error, which AdamW amplifies from step to step.

    Other micro-batches give other last digits, on a single rank too.
    """
    for ours, theirs in zip(records, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5, abs=2e-5)


def local_part(tensor: Any) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_size(lab: Lab) -> int:
    """The number of trained weights that this rank holds."""
    return sum(local_part(p).numel() for _, p in lab.policy.parameters)
