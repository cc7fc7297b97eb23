"""Scoring completions: what a reward may return, and how failures count."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Real
from typing import Any

from minidistill.envs.protocol import has_rewards
from minidistill.errors import UserError, printable
from minidistill.system.foreign import describe, foreign_code
from minidistill.types import Reward, Task

RESERVED = {"mean"}
"""Metrics that the run records itself, beside those of a reward: `reward/mean`."""
LONGEST_NAME = 100
"""Characters of a metric's name."""
MOST_METRICS = 100
"""Metrics of one reward."""
EXPECTED = 'return a number, a bool, a dict with the key "reward", or a Reward'


class ScoringError(Exception):
    """A completion could not be scored.

    `slow` says that this took long: a time limit was reached, or a process has to start again.
    Failures with a `kind` are counted by it.
    """

    def __init__(self, message: str, slow: bool = False, kind: str = "") -> None:
        super().__init__(message)
        self.slow, self.kind = slow, kind


class RefusedError(ScoringError):
    """What a conversation asked cannot be answered, such as tools that no chat template takes."""


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

    If it has `score_all(attempts, report)`, that is called once instead. `report` gets one outcome
    for each attempt. Raises CannotScoreError, and what `report` raises.
    """
    if not has_rewards(scorer):
        for index in range(len(attempts)):
            report(index, Reward(0.0))
    elif (score_all := getattr(scorer, "score_all", None)) is not None:
        _score_together(score_all, attempts, report)
    else:
        for index, attempt in enumerate(attempts):
            report(index, score_one(scorer, attempt.task, attempt.completion))


def score_one(scorer: Any, task: Task, completion: str) -> Outcome:
    """The outcome of `scorer.score`. Only Ctrl-C and CannotScoreError are raised."""
    return _outcome(lambda: to_reward(scorer.score(task, completion)))


def _outcome(score: Callable[[], Outcome]) -> Outcome:
    """What `score` returns, or the failure that it raises."""

    def failure(error: BaseException) -> ScoringError:
        return ScoringError(describe(error))

    try:
        with foreign_code(failure, ours=(ScoringError, CannotScoreError)):
            return score()
    except ScoringError as error:
        return error


def _score_together(
    score_all: Callable[..., None], attempts: Sequence[Attempt], report: Report
) -> None:
    """Call `score_all`. The attempts that it reports nothing for have failed."""
    left = set(range(len(attempts)))
    stopped: list[BaseException] = []

    def check(index: int, value: object) -> None:
        try:
            if index not in left:
                raise CannotScoreError(
                    f"score_all reported attempt {index!r} of {len(attempts)}, which does not "
                    "exist or was reported before",
                    where="orchestrator.env",
                    fix="call report(index, reward) once for each attempt, with its index from 0",
                )
            left.remove(index)
            report(index, _outcome(partial(_reported, value)))
        except BaseException as error:  # to be told from what score_all raises itself
            stopped.append(error)
            raise

    def call() -> Outcome:
        score_all(attempts, check)
        return ScoringError("score_all reported no score for it")

    failure = _outcome(call)
    if stopped:
        raise stopped[0]
    for index in sorted(left):
        report(index, failure)


def _reported(value: object) -> Outcome:
    return value if isinstance(value, ScoringError) else to_reward(value)


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

    def wrong() -> str:
        return f"it returned {_short(value)}: {EXPECTED}"

    number = _number(value, wrong, lambda: "the reward")
    if len(metrics) > MOST_METRICS:
        raise ScoringError(
            f"it returned {len(metrics)} metrics: at most {MOST_METRICS} are recorded"
        )
    return Reward(number, {_name(name): _metric(name, value) for name, value in metrics.items()})


def _name(name: object) -> str:
    """A metric's name, which is recorded after `reward/`."""
    if not isinstance(name, str):
        raise ScoringError(f"the metric {_short(name)} has no text as its name")
    if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME or name != printable(name):
        raise ScoringError(
            f"the metric {_short(name)} needs a name of 1 to {LONGEST_NAME} printable characters"
        )
    if name in RESERVED:
        raise ScoringError(f"the metric {name!r} has the name of one that the run records itself")
    return name


def _metric(name: object, value: object) -> float:
    def described() -> str:
        return f"the metric {_short(name)}"

    return _number(value, lambda: f"{described()} is {_short(value)}: give a number", described)


def _number(value: object, wrong: Callable[[], str], name: Callable[[], str]) -> float:
    """`value` as a finite float. Raises ScoringError: with `wrong()` if it is no number.

    Both texts are made for an error only, for they call a user's `repr`.
    """
    if not isinstance(value, Real | Decimal) and callable(item := getattr(value, "item", None)):
        try:
            value = item()
        except (TypeError, ValueError, RuntimeError):
            raise ScoringError(wrong()) from None
    if not isinstance(value, Real | Decimal):
        raise ScoringError(wrong())
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer above 1e308, a signaling NaN
        number = math.inf
    if not math.isfinite(number):
        raise ScoringError(f"{name()} is {number}, which is not finite")
    return number


def _short(value: object) -> str:
    """`value` in a few words: a user's `repr` may be long, or fail."""
    try:
        with foreign_code(lambda error: ScoringError(describe(error))):
            return reprlib.repr(value)
    except ScoringError:
        return f"a {type(value).__name__}"
