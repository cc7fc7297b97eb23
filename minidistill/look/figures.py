"""The figures of an evaluation: means over tasks, their intervals, and differences of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minidistill.evaluation.intervals import (
    MIN_TASKS,
    Array,
    Interval,
    PromptSums,
    percentiles,
    picks,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over tasks with its 95% interval, and its values in each resample of the tasks.

    `interval` is None if there are fewer than `MIN_TASKS` tasks, or if all of them agree.
    """

    mean: float
    interval: Interval | None
    resampled: Array | None

    @classmethod
    def of_values(cls, values: Sequence[float], seed: int) -> Figure:
        """Of one value for each task."""
        array = np.asarray(values, dtype=float)
        if len(values) < MIN_TASKS:
            return cls(float(array.mean()), None, None)
        means = array[picks(len(values), seed)].mean(axis=1)
        return cls(float(array.mean()), percentiles(means), means)

    @classmethod
    def of_kl(cls, sums: PromptSums, seed: int) -> Figure:
        """Nats a token, over completions of the prompts."""
        if len(sums.sums) < MIN_TASKS:
            return cls(sums.mean, None, None)
        means = sums.resampled(picks(len(sums.sums), seed))
        return cls(sums.mean, percentiles(means), means)

    def minus(self, other: Figure) -> Figure:
        """The difference on the same tasks: in each resample both have the same ones."""
        mean = self.mean - other.mean
        if self.resampled is None or other.resampled is None:
            return Figure(mean, None, None)
        differences = self.resampled - other.resampled
        return Figure(mean, percentiles(differences), differences)


@dataclass(frozen=True, slots=True)
class Result:
    """What one view of one source has reached."""

    name: str
    """The source's, as it was given."""
    view: str
    score: Figure | None
    """None if an environment has no reward."""
    by_env: Mapping[str, Figure]
    rewards: Mapping[str, Sequence[float]]
    """By environment: the mean reward of each task."""
    length: float
    """Mean tokens of a completion."""
    kl: Figure | None = None
    """KL to the base (or another teacher) that reads the context, on held-out prompts. None if no
    context is known, and of views that read it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of all sources on the same tasks."""

    environments: Mapping[str, Sequence[str]]
    """The ids of the tasks of each."""
    seed: int
    samples: int
    temperature: float
    max_tokens: int
    results: Sequence[Result]
