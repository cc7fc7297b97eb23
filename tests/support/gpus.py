"""GPU tests on a machine without a GPU: the same calls, with small sizes, on the CPU.

Tests marked `gpu` are not skipped there. They are rehearsed: a wrong argument, a missing attribute
or a wrong shape fails them on any machine. What only a GPU can show, such as a speed, a compiled
kernel or a handle between two GPUs, a rehearsal does not prove.

This file imports nothing but torch, so that the kernels' tests run where pydantic is missing.
"""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch

T = TypeVar("T")

GPUS = torch.cuda.device_count()
REHEARSED = GPUS == 0
DEVICE = torch.device("cpu") if REHEARSED else torch.device("cuda", 0)
TWO_GPUS = pytest.mark.skipif(GPUS == 1, reason="needs two NVIDIA GPUs, this machine has one")


def size(full: T, tiny: T) -> T:
    """`full` on a GPU, `tiny` in a rehearsal."""
    return tiny if REHEARSED else full
