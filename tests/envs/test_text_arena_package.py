"""A game of the real package textarena, where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from minidistill.envs.registry import load_environment
from minidistill.types import Message, Task, Turn

pytest.importorskip("textarena", reason="textarena is not installed")


async def play(environment: Any, task: Task) -> tuple[Any, list[str]]:
    """Halve the range until the number is found."""
    least, most, guess, said = 1, 20, 0, list[str]()

    async def policy(messages: Sequence[Message]) -> Turn:
        nonlocal least, most, guess
        said.append(messages[-1]["content"])
        least = guess + 1 if said[-1].endswith("higher.") else least
        most = guess - 1 if said[-1].endswith("lower.") else most
        guess = (least + most) // 2
        return Turn(f"[{guess}]", token_ids=(1,))

    return await environment.rollout(task, policy), said


def test_a_number_is_guessed() -> None:
    args = {"game": "GuessTheNumber-v0", "num_train_examples": 6, "num_eval_examples": 2}
    environment: Any = load_environment("textarena", args)
    assert (len(environment.train), len(environment.eval)) == (6, 2)

    async def together() -> list[Any]:
        return await asyncio.gather(*(play(environment, task) for task in environment.train))

    for reward, said in asyncio.run(together()):
        assert (reward.value, reward.metrics["ended"], reward.metrics["invalid"]) == (1, 1, 0)
        assert reward.metrics["turns"] == len(said) <= 5
        assert "between 1 and 20" in said[0]
        assert all(text.startswith("The target number is ") for text in said[1:])


def test_its_rules_are_left_to_the_context() -> None:
    args = {"game": "GuessTheNumber-v0", "num_train_examples": 2, "num_eval_examples": 1}
    environment: Any = load_environment("textarena", {**args, "rules": "omit"})
    [message] = environment.train[0].messages
    assert message["content"] == "Make your move."
