"""Frozen Lake: its maps and its conversations."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from minidistill.envs.frozen_lake.lakes import Lake
from minidistill.envs.registry import load_environment
from minidistill.errors import UserError
from minidistill.types import Message, Reward, Task, Turn

LAKE = Lake(("_O_", "__O", "O_G"), (0, 0), 4)
SMALL = {"num_train_examples": 40, "num_eval_examples": 10}


def play(
    answers: Sequence[str], lake: Lake = LAKE, id: str = "t", **args: Any
) -> tuple[Reward, list[list[Message]]]:
    """The reward of a conversation with these answers, and the messages of each turn."""
    environment: Any = load_environment("frozen-lake-env", {**SMALL, **args})
    asked: list[list[Message]] = []

    async def policy(messages: Sequence[Message]) -> Turn:
        asked.append(list(messages))
        if len(asked) > len(answers):
            return Turn("", truncated=True)
        return Turn(answers[len(asked) - 1], token_ids=(1,))

    task = Task(id, ({"role": "user", "content": lake.render(lake.start)},), lake)
    return asyncio.run(environment.rollout(task, policy)), asked


def test_the_lake_is_shown_after_each_turn_until_the_goal() -> None:
    reward, asked = play(["<answer>D</answer>", "<answer>right, down, right</answer>"])
    assert reward.value == 1
    assert reward.metrics == {
        "solved": 1, "fell": 0, "length_vs_optimal": 1, "parse_failures": 0, "blocked_moves": 0,
        "turns": 2,
    }  # fmt: skip
    assert asked[0][0]["content"] == "P O _\n_ _ O\nO _ G"
    assert asked[1][-1]["content"] == (
        "You are on the ice, and not at the goal yet.\n\n_ O _\nP _ O\nO _ G"
    )


def test_a_hole_ends_it_and_the_edge_does_not() -> None:
    answers = ["<answer>UL</answer>", "?", "<answer>DDRR</answer>", "<answer>R</answer>"]
    reward, asked = play(answers)
    assert len(asked) == 3
    assert asked[1][-1]["content"].startswith("Off the edge: U (move 1), L (move 2). You are on")
    assert asked[2][-1]["content"].startswith("No moves were found. ")
    assert (reward.value, reward.metrics["fell"], reward.metrics["blocked_moves"]) == (0, 1, 2)


def test_turns_and_moves_are_limited() -> None:
    reward, asked = play(["<answer>DRDR</answer>"] * 9, max_turns=2, moves_per_turn=1)
    assert len(asked) == 2
    assert asked[1][-1]["content"].startswith("Only the first 1 moves count.")
    assert reward.value == 0


def tasks(**args: Any) -> tuple[list[Task], list[Task]]:
    environment: Any = load_environment("frozen-lake-env", {**SMALL, **args})
    return environment.train, environment.eval


def forms(lake: Lake) -> set[tuple[str, ...]]:
    """The lake rotated and mirrored, with the player."""
    rows = lake.render(lake.start).replace(" ", "").split("\n")
    cells = {(r, c): rows[r][c] for r, c in product(range(len(rows)), repeat=2)}
    last = len(rows) - 1
    maps = [
        lambda r, c: (r, c), lambda r, c: (c, last - r), lambda r, c: (last - r, last - c),
        lambda r, c: (last - c, r),
    ]  # fmt: skip
    maps += [lambda r, c, f=f: f(c, r) for f in maps]
    return {
        tuple("".join(cells[f(r, c)] for c in range(len(rows))) for r in range(len(rows)))
        for f in maps
    }


def test_lakes_are_different_in_and_between_the_splits() -> None:
    train, held_out = tasks(size=3, holes=0.3, min_moves=1)
    lakes = [task.answer for task in (*train, *held_out)]
    seen = Counter(form for lake in lakes for form in forms(lake))
    assert set(seen.values()) == {1}
    assert tasks(size=3, holes=0.3, min_moves=1)[0][0].answer == train[0].answer
    assert tasks(size=3, holes=0.3, min_moves=1, seed=1)[0][0].answer != train[0].answer
    fewer = load_environment("frozen-lake-env", {"num_train_examples": 9, "num_eval_examples": 9})
    assert [t.answer for t in fewer.train] == [t.answer for t in tasks()[0]][:9]


def test_every_lake_can_be_crossed_in_its_number_of_moves_and_no_fewer() -> None:
    for task in tasks(min_moves=3)[0]:
        lake: Lake = task.answer
        reached = {lake.start}
        for _ in range(lake.moves):
            assert not any(lake.kind(cell) == "G" for cell in reached)
            steps = {lake.step(cell, move) for cell in reached for move in "UDLR"}
            reached = {cell for cell in steps if cell and lake.kind(cell) != "O"}
        assert any(lake.kind(cell) == "G" for cell in reached)
        assert lake.moves >= 3


def test_rules_are_in_the_prompt_unless_they_are_left_out() -> None:
    full, bare, wet = (
        tasks(**args)[0][0].messages[0]["content"]
        for args in ({}, {"rules": "omit"}, {"is_slippery": True})
    )
    assert full.endswith(bare)
    assert full.startswith("Frozen Lake: ")
    assert "slippery" in wet
    assert "slippery" not in full
    assert bare.startswith("Reach the goal. Give the moves")


def test_slippery_ice_is_the_same_each_time_a_task_is_played() -> None:
    open_water = Lake(("_____",) * 4 + ("____G",), (2, 2), 4)
    answers = ["<answer>RLRLRLUDUD</answer>"]
    ends = {
        id: [play(answers, open_water, id, is_slippery=True)[1][-1][-1] for _ in range(2)]
        for id in ("a", "b", "c")
    }
    assert all(first == second for first, second in ends.values())
    assert len({str(first) for first, _ in ends.values()}) > 1
    assert play(answers, open_water)[1][-1][-1]["content"].endswith(open_water.render((2, 2)))


@pytest.mark.parametrize(
    "args",
    [
        {"size": 1},
        {"size": 17},
        {"holes": 1.0},
        {"holes": float("nan")},
        {"min_moves": 0},
        {"max_turns": True},
        {"moves_per_turn": 0},
        {"rules": "none"},
        {"is_slippery": 1},
        {"seed": "x"},
        {"num_eval_examples": 0},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"frozen-lake-env: {next(iter(args))} = "):
        load_environment("frozen-lake-env", {**SMALL, **args})


def test_more_lakes_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"there are only \d+ lakes for the train split"):
        load_environment("frozen-lake-env", {"size": 2, "min_moves": 1})
