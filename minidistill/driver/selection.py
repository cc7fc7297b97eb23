"""The best evaluation so far, and whether the run should end early.

It reads the metrics that are recorded, so a resumed run gets the same state from `metrics.jsonl`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.config import Config
from minidistill.envs import Environment, has_rewards
from minidistill.errors import UserError
from minidistill.reporting.formatting import number

logger = logging.getLogger(__name__)
HELDOUT_KL, REWARD = "eval/heldout_kl", "eval/reward"
METRICS = {"heldout_kl": HELDOUT_KL, "reward": REWARD}
"""What is recorded at an evaluation, by the settings' names."""
NAMES = {"heldout_kl": "held-out KL", "reward": "held-out reward"}
"""As texts call it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An evaluation's figure."""

    step: int
    value: float

    @property
    def place(self) -> str:
        return f"at step {self.step}" if self.step else "before training"


def pooled_mean(rewards: Mapping[str, Sequence[float]]) -> float:
    """The mean over the tasks of all environments, which have rewards: see `check`."""
    values = [value for of_env in rewards.values() for value in of_env]
    return sum(values) / len(values)


def check(config: Config, environments: Mapping[str, Environment]) -> None:
    """Raise UserError if a reward is asked for and no evaluated environment has one. Warns if the
    run has a single evaluation, with which nothing can be compared."""
    evaluation = config.orchestrator.eval
    if asked(config) and evaluation is not None and evaluation.interval >= config.max_steps:
        logger.warning(
            f"orchestrator.eval.interval = {evaluation.interval} is not below max_steps = "
            f"{config.max_steps}: the last step alone is evaluated, so there is nothing to choose"
        )
    if "reward" in asked(config) and not any(map(has_rewards, environments.values())):
        key = "ckpt.best" if config.ckpt.best == "reward" else "early_stopping.metric"
        raise UserError(
            f'{key} = "reward", but no environment that is evaluated has a reward',
            where=key,
            fix='set it to "heldout_kl", the KL to the teacher',
        )


def asked(config: Config) -> set[str]:
    """The figures, by the settings' names, that evaluations have to give."""
    stopping = config.early_stopping
    names = {config.ckpt.best, None if stopping is None else stopping.metric}
    return {name for name in names if name is not None}


class Selection:
    """Follows the evaluations of a run. A figure that is not finite is never progress."""

    def __init__(self, config: Config) -> None:
        self._by, self._stopping = config.ckpt.best, config.early_stopping
        self.best: Mark | None = None
        """The best evaluation of a trained student, the earliest of equal ones; None without
        `ckpt.best`, or without a finite figure."""
        self.stopped: str | None = None
        """Why the run ends early, a sentence; None if it does not."""
        self.evaluations = 0
        """Of a trained student."""
        self._progress: Mark | None = None
        self._without = 0

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the records of a resumed run."""
        for record in records:
            self.take(record["step"], record)

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of an evaluation. Others have none of the figures."""
        if self._by is not None and METRICS[self._by] in metrics and step > 0:
            self.evaluations += 1
            value = _finite(metrics[METRICS[self._by]])
            if value is not None and (
                self.best is None or _gain(self._by, self.best.value, value) > 0
            ):
                self.best = Mark(step, value)
        stopping = self._stopping
        if stopping is None or METRICS[stopping.metric] not in metrics or self.stopped:
            return
        value, before = _finite(metrics[METRICS[stopping.metric]]), self._progress
        if value is not None and (
            before is None or _gain(stopping.metric, before.value, value) > stopping.min_delta
        ):
            self._progress, self._without = Mark(step, value), 0
        elif step > 0:
            self._without += 1
            if self._without >= stopping.patience:
                self.stopped = f"stopped early at step {step}: {self._lack_of_progress()}"

    def is_best(self, step: int) -> bool:
        return self.best is not None and self.best.step == step

    def described(self) -> str:
        """What the best is, for a scoreboard."""
        assert self.best is not None
        assert self._by is not None
        order = "lowest" if self._by == "heldout_kl" else "highest"
        count = f"{self.evaluations} evaluation{'s' * (self.evaluations > 1)}"
        return f"{order} {NAMES[self._by]} of {count}, {number(self.best.value)}"

    def _lack_of_progress(self) -> str:
        assert self._stopping is not None
        metric, delta = self._stopping.metric, self._stopping.min_delta
        moved = "fallen" if metric == "heldout_kl" else "risen"
        by = f" by more than {delta:g}" if delta else ""
        count = f"{self._without} evaluation{'s' * (self._without > 1)}"
        before = self._progress
        since = "" if before is None else f" since it was {number(before.value)} {before.place}"
        return f"{NAMES[metric]} has not {moved}{by} for {count}{since}"


def _gain(metric: str, before: float, now: float) -> float:
    """By how much a figure is better than another."""
    return before - now if metric == "heldout_kl" else now - before


def _finite(value: Any) -> float | None:
    """None for what is no number, as a record has it."""
    return float(value) if value is not None and math.isfinite(value) else None
