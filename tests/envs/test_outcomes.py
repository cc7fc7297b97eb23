"""What a reward may return, and what is counted as a failure."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from minidistill.envs.outcomes import (
    Attempt,
    CannotScoreError,
    Outcome,
    ScoringError,
    score_attempts,
    to_reward,
)
from minidistill.system.foreign import Interrupted
from minidistill.types import Reward, Task

RETURNED = {
    "a float": (0.25, 0.25),
    "an integer": (3, 3.0),
    "true": (True, 1.0),
    "false": (False, 0.0),
    "a fraction": (Fraction(1, 4), 0.25),
    "a decimal": (Decimal("0.25"), 0.25),
    "numpy's float": (np.float32(0.5), 0.5),
    "numpy's bool": (np.bool_(True), 1.0),
    "an array of one": (np.array([2.0]), 2.0),
    "a tensor of one": (torch.tensor(0.5), 0.5),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_number_in_any_form(name: str) -> None:
    value, number = RETURNED[name]
    for returned in (value, Reward(value), {"reward": value}):
        reward = to_reward(returned)
        assert reward == Reward(number)
        assert type(reward.value) is float


def test_a_good_number_is_not_described() -> None:
    """A user's `repr` may be slow."""

    asked = []

    class Slow(float):
        def __repr__(self) -> str:
            asked.append(self)
            return "slow"

    assert to_reward({"reward": Slow(0.5), "m": Slow(1.0)}) == Reward(0.5, {"m": 1.0})
    assert not asked


def test_metrics_are_floats() -> None:
    metrics = {"ok": True, "share": np.float64(0.5), "count": torch.tensor(3)}
    expected = Reward(1.0, {"ok": 1.0, "share": 0.5, "count": 3.0})
    assert to_reward({"reward": 1, **metrics}) == expected
    reward = to_reward(Reward(1, metrics))
    assert reward == expected
    assert {type(value) for value in reward.metrics.values()} == {float}


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "it returned None: return a number"),
    "text": ("0.5", "it returned '0.5'"),
    "a list": ([1.0], "it returned [1.0]"),
    "a complex number": (1j, "it returned 1j"),
    "several numbers": (np.array([1.0, 2.0]), "it returned array([1., 2.])"),
    "a tensor of several": (torch.ones(2), "it returned tensor([1., 1.])"),
    "a dict without a reward": ({"score": 1}, "it returned {'score': 1}, without the key"),
    "a dict with a text": ({"reward": "high"}, "it returned 'high'"),
    "no number": (float("nan"), "the reward is nan, which is not finite"),
    "infinity": (np.float32("-inf"), "which is not finite"),
    "a huge integer": (10**400, "which is not finite"),
    "a metric of text": (Reward(1.0, {"verdict": "good"}), "the metric 'verdict' is 'good'"),  # type: ignore[dict-item]
    "a metric without a value": ({"reward": 1, "x": float("nan")}, "the metric 'x' is nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_and_named(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ScoringError) as caught:
        to_reward(value)
    assert message in str(caught.value)


class Raising:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def score(self, task: Task, completion: str) -> Reward:
        raise self.error


def outcome(scorer: Any) -> Outcome:
    outcomes: list[Outcome] = []
    score_attempts(scorer, [Attempt(Task("t", ()), "")], lambda i, value: outcomes.append(value))
    return outcomes[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("absent"), "KeyError: 'absent'"),
        (SystemExit(), "it called sys.exit()"),
        (SystemExit("bye"), "it called sys.exit('bye')"),
        (BaseException("odd"), "BaseException: odd"),
        (GeneratorExit(), "GeneratorExit: "),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (asyncio.CancelledError(), "CancelledError: "),
    ],
)
def test_every_exception_is_a_failure(error: BaseException, message: str) -> None:
    failure = outcome(Raising(error))
    assert isinstance(failure, ScoringError)
    assert str(failure) == message


@pytest.mark.parametrize("error", [Interrupted(), CannotScoreError("over")])
def test_what_ends_the_run_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        outcome(Raising(error))


def test_an_environment_without_rewards_is_not_asked() -> None:
    scorer: Any = Raising(SystemExit())
    scorer.has_rewards = False
    assert outcome(scorer) == Reward(0.0)
