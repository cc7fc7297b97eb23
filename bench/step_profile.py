"""Where the training phase spends its time, by kinds of operations, from torch's profiler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from minidistill.trainer.trainer import Trainer

# The first kind with a word of an operation's name has it.
KINDS = {
    "products": ("mm", "linear", "matmul"),
    "attention": ("attention",),
    "copies": (
        *("copy", "cat", "clone", "contiguous", "index", "gather", "scatter", "embedding"),
        *("_to", "stack", "repeat"),
    ),
    "allocation": ("empty", "zero", "fill", "resize", "ones", "full"),
}
REST = "element by element"
OUTSIDE = "outside of operations"
"""Python, autograd and the profiler itself."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one call."""

    shares: dict[str, float]
    """Of the call's seconds, by kind; the largest first."""
    largest: dict[str, float]
    """The operations with the largest shares."""
    products_per_second: float
    """Operations a second while products of matrices run."""


def kind_of(name: str) -> str:
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return REST


def profile_training(trainer: Trainer, step: Callable[[], Any], largest: int = 8) -> Profile:
    """Profile the trainer's part of the step that `step` takes."""
    train = trainer.step
    result: list[Profile] = []

    def profiled(*args: Any) -> Any:
        began = time.perf_counter()
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, record_shapes=True, with_flops=True) as record:
            output = train(*args)
            seconds = time.perf_counter() - began
        events = record.key_averages(group_by_input_shape=True)
        result.append(summary(events, seconds, largest))
        return output

    with mock.patch.object(trainer, "step", profiled):
        step()
    return result[0]


def summary(events: Any, seconds: float, largest: int) -> Profile:
    by_kind: dict[str, float] = {}
    by_name: dict[str, float] = {}
    flops = 0.0
    for event in events:
        own = event.self_cpu_time_total / 1e6
        kind = kind_of(event.key)
        by_kind[kind] = by_kind.get(kind, 0.0) + own
        by_name[event.key] = by_name.get(event.key, 0.0) + own
        flops += operations(event) if kind == "products" else 0
    by_kind[OUTSIDE] = max(0.0, seconds - sum(by_kind.values()))
    products = by_kind.get("products", 0.0)
    return Profile(
        _shares(by_kind, seconds),
        dict(list(_shares(by_name, seconds).items())[:largest]),
        flops / products if products else 0.0,
    )


def operations(event: Any) -> float:
    """Of products of matrices; torch does not count oneDNN's."""
    if not event.key.startswith("mkldnn::_linear"):
        return float(event.flops)
    x, weight = event.input_shapes[:2]
    return 2.0 * math.prod(x) * weight[0] * event.count


def _shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: value / total for name, value in ordered}
