"""Scoring completions: what a reward may return, and what becomes of one that fails."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from minidistill.envs.protocol import has_rewards
from minidistill.errors import UserError
from minidistill.foreign import describe, foreign_code
from minidistill.types import Reward, Task

EXPECTED = 'return a number, a bool, a dict with the key "reward", or a Reward'


class ScoringError(Exception):
    """A completion could not be scored. `slow` says that a time limit was reached."""

    def __init__(self, message: str, slow: bool = False) -> None:
        super().__init__(message)
        self.slow = slow


class CannotScoreError(UserError):
    """Nothing can be scored any more. This ends the run, unlike a `ScoringError`."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion to score. `tokens` is its length as sampled, None if that is not known."""

    task: Task
    completion: str
    tokens: int | None = None


Outcome = Reward | ScoringError
Report = Callable[[int, Outcome], None]
"""Called with the number of an attempt and its outcome, in any order. It may raise to stop."""


def score_attempts(scorer: Any, attempts: Sequence[Attempt], report: Report) -> None:
    """Score `attempts` with an environment, or with another object that has its `score`.

    If it has `score_all(attempts, report)`, that is called once instead. Raises CannotScoreError,
    and what `report` raises.
    """
    if not has_rewards(scorer):
        for index in range(len(attempts)):
            report(index, Reward(0.0))
    elif (score_all := getattr(scorer, "score_all", None)) is not None:
        score_all(attempts, lambda index, outcome: report(index, checked(outcome)))
    else:
        for index, attempt in enumerate(attempts):
            report(index, score_one(scorer, attempt.task, attempt.completion))


def checked(outcome: object) -> Outcome:
    """What a `score_all` reports, read as what a `score` returns."""
    try:
        return outcome if isinstance(outcome, ScoringError) else to_reward(outcome)
    except ScoringError as error:
        return error


def score_one(scorer: Any, task: Task, completion: str) -> Outcome:
    """The outcome of `scorer.score`. Only Ctrl-C and CannotScoreError are raised."""

    def failure(error: BaseException) -> ScoringError:
        return ScoringError(describe(error))

    try:
        with foreign_code(failure, ours=(ScoringError, CannotScoreError)):
            return to_reward(scorer.score(task, completion))
    except ScoringError as error:
        return error


def to_reward(value: object) -> Reward:
    """What a reward returned, as a Reward of plain floats.

    Takes a number (also of numpy, or a tensor with one element), a bool, a Reward, or a mapping
    with the key "reward", whose other entries are metrics. Raises ScoringError for anything else,
    and for numbers that are not finite.
    """
    metrics: Mapping[Any, object] = {}
    if isinstance(value, Reward):
        metrics, value = value.metrics, value.value
    elif isinstance(value, Mapping):
        if "reward" not in value:
            raise ScoringError(f'it returned {_short(value)}, without the key "reward"')
        metrics = {name: metric for name, metric in value.items() if name != "reward"}
        value = value["reward"]
    number = _number(value, f"it returned {_short(value)}: {EXPECTED}", "the reward")
    return Reward(number, {str(name): _metric(name, metric) for name, metric in metrics.items()})


def _metric(name: object, value: object) -> float:
    wrong = f"the metric {_short(name)} is {_short(value)}: give a number"
    return _number(value, wrong, f"the metric {_short(name)}")


def _number(value: object, wrong: str, name: str) -> float:
    """`value` as a finite float. Raises ScoringError: `wrong` if it is no number."""
    if not isinstance(value, Real | Decimal) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except (TypeError, ValueError, RuntimeError):
            raise ScoringError(wrong) from None
    if not isinstance(value, Real | Decimal):
        raise ScoringError(wrong)
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer above 1e308, a signaling NaN
        number = math.inf
    if not math.isfinite(number):
        raise ScoringError(f"{name} is {number}, which is not finite")
    return number


def _short(value: object) -> str:
    """`value` in a few words: a user's `repr` may be long, or fail."""
    try:
        with foreign_code(lambda error: ScoringError(describe(error))):
            return reprlib.repr(value)
    except ScoringError:
        return f"a {type(value).__name__}"
