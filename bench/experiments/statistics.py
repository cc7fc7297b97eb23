"""Means over seeds with their intervals. Seeds are few, so intervals are Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

T975 = {3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646}
"""The 97.5% quantile of Student's t with n - 1 degrees of freedom, by the number of values n."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds, with its 95% interval: None with fewer than three values."""

    value: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @property
    def lowest(self) -> float:
        return min(self.values)


def mean(values: Sequence[float]) -> Mean:
    """The mean of values that vary about it independently. Raises ValueError for none."""
    middle = fmean(values)
    if len(values) < min(T975):
        return Mean(middle, None, None, tuple(values))
    half = T975[len(values)] * stdev(values) / math.sqrt(len(values))
    return Mean(middle, middle - half, middle + half, tuple(values))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """The mean difference of pairs: the same seed has the same tasks and the same first samples."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])
