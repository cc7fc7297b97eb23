"""Multi-turn Sokoban: what is shown after each turn, and the final score."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from minidistill.envs.registry import load_environment
from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.levels import Level
from minidistill.errors import UserError
from minidistill.types import Message, Reward, Task, Turn

LEVEL = Level("#######\n#@ $ .#\n#     #\n#######", "RRR")
ARGS = {"num_train_examples": 4, "num_eval_examples": 4, "rules": "omit", "mode": "multi"}


def play(answers: Sequence[str], **args: Any) -> tuple[Reward, list[list[Message]]]:
    """The reward of a conversation with these answers, and the messages of each turn."""
    environment: Any = load_environment("sokoban-env", {**ARGS, **args})
    task = Task("t", environment.messages(LEVEL), LEVEL)
    asked: list[list[Message]] = []

    async def policy(messages: Sequence[Message]) -> Turn:
        asked.append(list(messages))
        if len(asked) > len(answers):
            return Turn("", truncated=True)
        return Turn(answers[len(asked) - 1], token_ids=(1,))

    return asyncio.run(environment.rollout(task, policy)), asked


def test_the_board_is_shown_after_each_turn_until_it_is_solved() -> None:
    reward, asked = play(["<answer>R</answer>", "<answer>rr</answer>", "<answer>R</answer>"])
    assert len(asked) == 2
    first, second = asked
    assert second[:1] == first
    assert second[1] == {"role": "assistant", "content": "<answer>R</answer>"}
    after = Board.parse(LEVEL.board).step("R")
    assert after is not None
    expected = f"The puzzle is not solved yet.\n\n{after.render()}"
    assert second[2] == {"role": "user", "content": expected}
    assert reward.value == 1
    assert reward.metrics == {
        "solved": 1, "boxes_on_goal": 1, "format": 1, "length_vs_optimal": 1,
        "parse_failures": 0, "illegal_moves": 0, "deadlocks": 0, "turns": 2,
    }  # fmt: skip


def test_what_was_not_done_is_said() -> None:
    reward, asked = play(["<answer>UL</answer>", "no idea", "<answer>RRRRRR</answer>"])
    assert asked[1][-1]["content"].startswith("Not possible: U (move 1), L (move 2). The puzzle")
    assert asked[2][-1]["content"].startswith("No moves were found. Give the moves (U, D, L, R)")
    assert reward.metrics["solved"] == 1
    assert reward.metrics["illegal_moves"] == 2
    assert reward.metrics["parse_failures"] == 1
    assert reward.metrics["format"] == pytest.approx(2 / 3)
    assert reward.metrics["length_vs_optimal"] == 3 / 5


def test_turns_and_moves_are_limited() -> None:
    reward, asked = play(["<answer>RRR</answer>"] * 9, max_turns=2, moves_per_turn=1)
    assert len(asked) == 2
    assert "Give the next moves, at most 1 (U, D, L, R)" in asked[0][0]["content"]
    assert asked[1][-1]["content"].startswith("Only the first 1 moves count.")
    assert (reward.value, reward.metrics["turns"]) == (0, 2)


def test_without_room_the_board_is_scored_as_it_is() -> None:
    reward, asked = play(["<answer>R</answer>"], weights={"boxes_on_goal": 0.5, "format": 0.25})
    assert len(asked) == 2
    assert reward.value == 0.25


def test_the_prompt_is_the_one_of_a_single_turn() -> None:
    multi: Any = load_environment("sokoban-env", ARGS)
    single: Any = load_environment("sokoban-env", {**ARGS, "mode": "single"})
    assert multi.messages(LEVEL) == single.messages(LEVEL)
    assert not hasattr(single, "rollout")


@pytest.mark.parametrize(
    "args",
    [
        {"mode": "both"},
        {"max_turns": 0},
        {"moves_per_turn": True},
        {"max_turns": 3, "mode": "single"},
        {"moves_per_turn": 2, "mode": "single"},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"sokoban-env: {next(iter(args))} = "):
        load_environment("sokoban-env", {**ARGS, **args})
