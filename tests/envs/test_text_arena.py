"""Games of textarena through a stand-in for the package."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import fake_textarena

from minidistill.envs.registry import load_environment
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.types import Message, Reward, Task, Turn

ARGS = {"game": "Dice-v0", "num_train_examples": 12, "num_eval_examples": 4}


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textarena", fake_textarena)


async def play(environment: Any, task: Task, answers: Sequence[str]) -> tuple[Reward, list[str]]:
    """The reward, and what the game said after each answer. Others play in between."""
    said: list[str] = []

    async def policy(messages: Sequence[Message]) -> Turn:
        await asyncio.sleep(0)
        said.append(messages[-1]["content"])
        left = answers[len(said) - 1 :]
        return Turn(left[0], token_ids=(1,)) if left else Turn("", truncated=True)

    return await environment.rollout(task, policy), said


def test_a_game_is_played_to_its_end() -> None:
    environment: Any = load_environment("textarena", ARGS)
    answers = ["[1]", "[2]", "[stop]", "[3]"]
    reward, said = asyncio.run(play(environment, environment.train[0], answers))
    assert said[0] == "Say a number."
    assert all(text.startswith("The die shows ") for text in said[1:])
    assert len(said) == 3
    assert reward == Reward(0.75, {"ended": 1.0, "invalid": 0.0, "turns": 3.0})


def test_a_game_that_does_not_end_counts_as_0() -> None:
    environment: Any = load_environment("textarena", {**ARGS, "max_turns": 2})
    reward, said = asyncio.run(play(environment, environment.train[0], ["[1]"] * 5))
    assert (reward.value, reward.metrics["ended"], len(said)) == (0, 0, 2)
    reward, said = asyncio.run(play(environment, environment.train[0], ["[1]"]))
    assert (reward.value, reward.metrics["turns"]) == (0, 1)


def test_games_at_once_draw_from_their_own_random_numbers() -> None:
    """They use Python's global generator, as the package's games do."""
    environment: Any = load_environment("textarena", ARGS)
    answers = [f"[{i}]" for i in range(8)]
    alone = [asyncio.run(play(environment, task, answers)) for task in environment.train]

    async def together() -> list[Any]:
        games = [play(environment, task, answers) for task in environment.train]
        return list(await asyncio.gather(*games))

    random.seed(5)
    before, numpy_before = random.getstate(), str(np.random.get_state())
    assert asyncio.run(together()) == alone
    assert random.getstate() == before
    assert str(np.random.get_state()) == numpy_before
    assert len({tuple(said) for _, said in alone}) > 6


def test_starts_are_different_in_and_between_the_splits() -> None:
    environment: Any = load_environment("textarena", ARGS)
    tasks = [*environment.train, *environment.eval]
    targets = [environment.start(t.answer).game.state.game_state["target"] for t in tasks]
    assert len(set(targets)) == 16
    again: Any = load_environment("textarena", ARGS)
    assert [t.answer for t in again.eval] == [t.answer for t in environment.eval]
    other: Any = load_environment("textarena", {**ARGS, "seed": 1})
    assert [t.answer for t in other.eval] != [t.answer for t in environment.eval]


def test_rules_can_be_left_out_and_options_are_the_games() -> None:
    environment: Any = load_environment(
        "textarena", {**ARGS, "rules": "omit", "options": {"sides": 1}}
    )
    assert environment.train[0].messages[0]["content"] == "Make your move."
    _, said = asyncio.run(play(environment, environment.train[0], ["[1]", "[2]"]))
    assert said[1] == "The die shows 0."


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"game": "Chess"}, "game = 'Chess' cannot be used"),
        ({"game": "Pair-v0"}, "game = 'Pair-v0' cannot be used"),
        ({"game": "Coin-v0"}, r"Coin-v0 has only \d different starts for the train split"),
        ({"rules": "none"}, "rules = 'none' cannot be used"),
        ({"max_turns": 0}, "max_turns = 0 cannot be used"),
        ({"seed": 1.5}, "seed = 1.5 cannot be used"),
    ],
)
def test_what_cannot_be_played_is_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_environment("textarena", {**ARGS, **args})
    assert caught.value.exit_code == EXIT_USAGE


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(UserError, match="not installed: textarena") as caught:
        load_environment("textarena", ARGS)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "minidistill[textarena]" in caught.value.fix
