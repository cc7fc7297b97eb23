"""Time and memory of one call.

Memory on a CPU is the allocator's own account (the profiler's allocation events), so it is exact
for tensors and blind to scratch space inside a BLAS. On a GPU it is the caching allocator's peak.
Both are relative to what was allocated before the call: inputs do not count, outputs do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Peak of what `call` allocates through torch."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    results = record.profiler.kineto_results  # type: ignore[union-attr]
    deltas = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(deltas, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


def times_ms(call: Callable[[], Any], device: str = "cpu", budget_s: float = 6.0) -> list[float]:
    """Times of repeated calls after a warm-up: at least 3, at most 50, or `budget_s` in all."""
    call()
    taken: list[float] = []
    until = time.perf_counter() + budget_s
    while len(taken) < 3 or (len(taken) < 50 and time.perf_counter() < until):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            taken.append((time.perf_counter() - begin) * 1e3)
    return taken


def percentiles(taken: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th."""
    fifths = statistics.quantiles(taken, n=10, method="inclusive")
    return {"p20": fifths[1], "p50": statistics.median(taken), "p80": fifths[7]}
