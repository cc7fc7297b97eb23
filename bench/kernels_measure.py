"""Time and memory of one call.

Memory on a CPU is computed from the profiler's allocation events: exact for tensors, but without
the scratch space of a BLAS library. On a GPU it is the peak of the caching allocator. Both are
relative to what was allocated before the call, so outputs count and inputs do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The peak number of bytes that torch allocates during `call`."""
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
    allocated = peak = 0
    for _, change in sorted(deltas, key=lambda pair: pair[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak


def times_ms(call: Callable[[], Any], device: str = "cpu", budget_s: float = 6.0) -> list[float]:
    """Times of 3 to 50 calls after a warm-up. Stops after `budget_s` seconds."""
    call()
    times: list[float] = []
    until = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() < until):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": deciles[1], "p50": statistics.median(times), "p80": deciles[7]}
