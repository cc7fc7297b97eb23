"""GPU tests on a machine without a GPU: the same calls, with small sizes, on the CPU.

Tests marked `gpu` are not skipped there. They are rehearsed: a wrong argument, a missing attribute
or a wrong shape fails them on any machine. What only a GPU can show, such as a speed, a compiled
kernel or a handle between two GPUs, a rehearsal does not prove.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
import torch

from minidistill import cli
from minidistill.config import load_config
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from support.paths import SOKOBAN

T = TypeVar("T")

GPUS = torch.cuda.device_count()
REHEARSED = GPUS == 0
DEVICE = torch.device("cpu") if REHEARSED else torch.device("cuda", 0)
TWO_GPUS = pytest.mark.skipif(GPUS == 1, reason="needs two NVIDIA GPUs, this machine has one")


def size(full: T, tiny: T) -> T:
    """`full` on a GPU, `tiny` in a rehearsal."""
    return tiny if REHEARSED else full


def run_on_gpus(path: Path, flags: tuple[str, ...], rehearsal: tuple[str, ...]) -> int:
    """A run of the shipped model in this process. Returns the exit code.

    A rehearsal plans the run on a machine with two GPUs, which reads every flag and refuses what a
    run there would refuse. Then it runs on the CPU, with `rehearsal` in place of `flags`.
    """
    if REHEARSED:
        machine = Machine(gpus=2, bytes=80 * GIB, vllm=True, bf16=True)
        assert plan_run(load_config([SOKOBAN, *flags]), machine).placement.trainer_gpus
    chosen = rehearsal if REHEARSED else flags
    return cli.main(["run", SOKOBAN, *chosen, "--output_dir", str(path)])
