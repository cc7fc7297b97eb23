"""What this machine can do at most, measured with torch: products of matrices, reading memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[], float]
SIZE = 2048  # of the matrices: large enough for full speed, a fraction of a second a product
STREAMED = 1 << 29  # bytes, more than any cache holds


def matrix_peak(clock: Clock, repeats: int = 5) -> float:
    """fp32 operations a second of a product of matrices: the fastest of `repeats`."""
    a, b = (torch.randn(SIZE, SIZE) for _ in range(2))
    out = torch.empty(SIZE, SIZE)
    return 2 * SIZE**3 / fastest(lambda: torch.mm(a, b, out=out), clock, repeats)


def memory_peak(clock: Clock, repeats: int = 5) -> float:
    """Bytes a second that are read: the fastest of sums and of products with a vector."""
    values = torch.ones(STREAMED // 4 // SIZE, SIZE)
    vector = torch.ones(SIZE)
    seconds = min(fastest(call, clock, repeats) for call in (values.sum, lambda: values @ vector))
    return STREAMED / seconds


def fastest(call: Callable[[], Any], clock: Clock, repeats: int) -> float:
    """Seconds on the clock of the fastest call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)
