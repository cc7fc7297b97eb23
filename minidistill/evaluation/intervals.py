"""Shares of a gap, and their bootstrap intervals over tasks or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
MIN_TASKS = 8  # a bootstrap over fewer says next to nothing about other tasks
NOTHING_TO_LEARN = 0.02
"""Nats of KL in a whole completion. By Pinsker's inequality, whoever reads a completion with less
and guesses whether its author had the context is right in at most 55% of cases."""

CLOSED = ("closed", "closed_low", "closed_high")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


def picks(count: int, seed: int) -> Array:
    """The tasks of each resample, (RESAMPLES, count): the same for all figures of a run."""
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))


def percentiles(values: Array) -> Interval | None:
    """The 95% interval of resampled values; NaN ones are left out.

    None if it has no width. All tasks then agree, and a bootstrap cannot say what others would do.
    """
    low, high = map(float, np.nanquantile(values, [0.025, 0.975]))
    return None if np.isclose(low, high, rtol=1e-9, atol=1e-12) else Interval(low, high)


def ratios(part: Array, whole: Array) -> Array:
    """part / whole, NaN where `whole` is 0: that resample has no gap."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


@dataclass(frozen=True, slots=True)
class PromptSums:
    """The KL to the teacher on one completion of each prompt, in nats."""

    mean: float
    """A token."""
    sums: Sequence[float]
    """By prompt, over its completion."""
    tokens: Sequence[int]
    """Of each completion."""

    def part(self, rows: Sequence[int]) -> PromptSums:
        """Those of some prompts."""
        sums, tokens = [self.sums[i] for i in rows], [self.tokens[i] for i in rows]
        return PromptSums(sum(sums) / sum(tokens), sums, tokens)

    def resampled(self, chosen: Array) -> Array:
        """The mean over each row of prompts."""
        sums, tokens = np.asarray(self.sums, dtype=float), np.asarray(self.tokens)
        return np.asarray(sums[chosen].sum(axis=1) / tokens[chosen].sum(axis=1))


def kl_closed(before: PromptSums, after: PromptSums | None, seed: int) -> dict[str, Any]:
    """The share of the KL to the teacher that training closed: 1 - after / before.

    Both have the same prompts in the same order. The interval is a percentile bootstrap over
    prompts, with both completions of a prompt drawn together; `closed_low` and `closed_high` are
    None if it has no width. `negligible` says that there was next to nothing to close: less than
    `NOTHING_TO_LEARN` in a completion, or an estimate that is 0 within chance. Then `closed` is
    None. It also is with fewer than `MIN_TASKS` prompts, and if a value is not finite.
    """
    count = len(before.sums)
    figures = {"prompts": count, "negligible": False, **dict.fromkeys(CLOSED)}
    known = [before.mean, *before.sums, *(() if after is None else (after.mean, *after.sums))]
    if count < MIN_TASKS or not np.isfinite(known).all():
        return figures
    chosen = picks(count, seed)
    means = before.resampled(chosen)
    enough = np.sum(before.sums) / count >= NOTHING_TO_LEARN
    if not (enough and np.quantile(means, 0.025) > 0):
        return figures | {"negligible": True}
    if after is None:
        return figures
    figures["closed"] = 1 - after.mean / before.mean
    if (interval := percentiles(1 - ratios(after.resampled(chosen), means))) is not None:
        figures |= {"closed_low": interval.low, "closed_high": interval.high}
    return figures
