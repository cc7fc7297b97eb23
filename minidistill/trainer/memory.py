"""The trainer's peak memory."""

from __future__ import annotations

import resource
import sys

import torch

from minidistill.placement.machine import GIB


def reset_peak(device: torch.device) -> None:
    """Start measuring a new peak on a GPU. On a CPU the peak is the process's and is not reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Peak memory: allocated by torch on a GPU, resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
