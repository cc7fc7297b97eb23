"""The trainer's peak memory."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1 << 30


def reset_peak(device: torch.device) -> None:
    """Measure the peak from here on. A CPU's peak is of the whole process and is not reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """The most that torch had allocated on a GPU, or the most that the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
