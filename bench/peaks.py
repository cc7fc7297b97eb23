"""What this machine can do at most, measured with torch: products of matrices, reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

SIZE = 2048  # of the matrices: large enough for full speed, a fraction of a second a product
STREAMED = 1 << 29  # bytes, more than any cache holds


def matrix_peak(repeats: int = 5) -> float:
    """fp32 operations a second of a product of matrices: the fastest of `repeats`."""
    a, b = (torch.randn(SIZE, SIZE) for _ in range(2))
    out = torch.empty(SIZE, SIZE)
    return 2 * SIZE**3 / fastest(lambda: torch.mm(a, b, out=out), repeats)


def memory_peak(repeats: int = 5) -> float:
    """Bytes a second that are read: the fastest of sums and of products with a vector."""
    values = torch.ones(STREAMED // 4 // SIZE, SIZE)
    vector = torch.ones(SIZE)
    seconds = min(fastest(lambda: values.sum(), repeats), fastest(lambda: values @ vector, repeats))
    return STREAMED / seconds


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
