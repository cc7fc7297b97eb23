"""Generated levels: their bounds, numbers and splits."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.sokoban import brute_force, equal_boards, replay

from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.levels import Level, LevelMaker, Recipe
from minidistill.errors import EXIT_USAGE, UserError

SMALL = Difficulty(min_w=5, max_w=6, min_h=5, max_h=6)
TINY = Difficulty(5, 5, 5, 5)  # few levels exist
PUBLIC = Difficulty(min_w=4, max_w=9, min_h=4, max_h=9, min_boxes=1, max_boxes=7, max_depth=80)


def take(
    count: int, difficulty: Difficulty = SMALL, seed: int = 0, split: str = "train"
) -> list[Level]:
    return LevelSet(difficulty, seed, split, count).take(range(count))


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"min_w": 5, "max_w": 7, "min_h": 4, "max_h": 5},
        {"min_boxes": 2, "max_boxes": 3},
        {"min_boxes": 4, "max_boxes": 4},
        {"max_depth": 3},
        {"min_moves": 8, "max_moves": 10},
        {"min_pushes": 2, "max_pushes": 3},
        {"min_boxes": 2, "max_boxes": 2, "min_boxes_off_goal": 2},
        {"min_boxes": 3, "max_boxes": 3, "min_boxes_off_goal": 1, "max_pushes": 2},
    ],
    ids=str,
)
def test_every_bound_holds(bounds: dict[str, int]) -> None:
    difficulty = Difficulty(**bounds)
    sizes, counts = set(), set()
    for level in take(8 if difficulty.max_boxes == 4 else 25, difficulty):
        rows = level.board.split("\n")
        assert {len(row) for row in rows} == {len(rows[0])}
        assert difficulty.min_w <= len(rows[0]) <= difficulty.max_w
        assert difficulty.min_h <= len(rows) <= difficulty.max_h
        edge = rows[0] + rows[-1] + "".join(row[0] + row[-1] for row in rows)
        assert set(edge) == {"#"}
        off_goal, boxes = level.board.count("$"), level.board.count("$") + level.board.count("*")
        assert off_goal >= difficulty.min_boxes_off_goal >= 1
        assert difficulty.min_boxes <= boxes <= difficulty.max_boxes
        boards = replay(level.board, level.solution)
        assert "$" not in boards[-1]
        places = [[i for i, c in enumerate(board) if c in "$*"] for board in boards]
        pushes = sum(a != b for a, b in pairwise(places))
        assert difficulty.min_pushes <= pushes <= (difficulty.max_pushes or pushes)
        most = min(difficulty.max_depth, difficulty.max_moves or difficulty.max_depth)
        assert difficulty.min_moves <= len(level.solution) <= most
        sizes.add((len(rows[0]), len(rows)))
        counts.add(boxes)
    # the whole range is used
    assert {w for w, _ in sizes} == set(range(difficulty.min_w, difficulty.max_w + 1))
    assert {h for _, h in sizes} == set(range(difficulty.min_h, difficulty.max_h + 1))
    assert counts == set(range(difficulty.min_boxes, difficulty.max_boxes + 1))


def test_every_floor_cell_is_reachable() -> None:
    for level in take(40, Difficulty()):
        rows = level.board.split("\n")
        floor = {(y, x) for y, row in enumerate(rows) for x, c in enumerate(row) if c != "#"}
        reached = {min(floor)}
        for _ in floor:
            near = {
                (y + a, x + b) for y, x in reached for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))
            }
            reached |= near & floor
        assert reached == floor


def test_solutions_are_optimal() -> None:
    for level in take(20, Difficulty(5, 6, 5, 5, 1, 2)):
        assert level.solution == brute_force(level.board)


PROGRAM = """
from minidistill.envs.sokoban import load
env = load(num_train_examples=30, num_eval_examples=10, min_w=5, max_w=7, max_boxes=3, seed=5)
print([t.answer for t in env.train[:]], [t.answer for t in env.eval[:]])
"""


def test_levels_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(tmp_path / seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("Level(") == 40


@pytest.mark.parametrize(("difficulty", "count"), [(SMALL, 40), (PUBLIC, 9)], ids=str)
def test_levels_do_not_depend_on_the_order_in_which_they_are_made(
    difficulty: Difficulty, count: int
) -> None:
    levels = take(count, difficulty)
    backwards = LevelSet(difficulty, 0, "train", count)
    assert [backwards[i] for i in reversed(range(count))][::-1] == levels
    assert LevelSet(difficulty, 0, "train", count)[count - 1] == levels[-1]
    assert not set(levels) <= set(take(count, difficulty, seed=1))
    for number in (count, -1):
        with pytest.raises(IndexError):
            backwards[number]


def test_the_first_levels_do_not_depend_on_how_many_there_are() -> None:
    assert take(33) == take(64)[:33]
    assert take(3, PUBLIC) == take(4, PUBLIC)[:3]


def test_a_level_is_made_without_others() -> None:
    recipe = Recipe.of(PUBLIC, 0, "train", 15_000)
    assert recipe.per_class == 1
    levels = LevelSet(PUBLIC, 0, "train", 15_000)
    assert LevelMaker(recipe).make(14_999) == levels[14_999]
    assert LevelMaker(recipe).make(0) == levels[0]


def test_levels_are_taken_in_any_order_and_more_than_once() -> None:
    levels = LevelSet(SMALL, 0, "train", 8)
    advanced: list[int] = []
    taken = levels.take([5, 1, 5], advanced.append)
    assert taken == [levels[5], levels[1], levels[5]]
    assert sum(advanced) == 3
    assert levels.take([]) == []


def test_splits_share_no_level() -> None:
    train = [v.board for seed in (0, 1) for v in take(60, TINY, seed)]
    evaluation = [v.board for seed in (0, 7) for v in take(25, TINY, seed, "eval")]
    forms = set().union(*map(equal_boards, train))
    assert not forms & set().union(*map(equal_boards, evaluation))
    # other seeds do overlap
    assert set().union(*map(equal_boards, train[:60])) & set().union(*map(equal_boards, train[60:]))


@pytest.mark.parametrize(
    ("difficulty", "split", "count"),
    [
        (TINY, "train", 60),
        (TINY, "eval", 30),
        (Difficulty(4, 6, 4, 6), "train", 300),
        (Difficulty(4, 7, 4, 5, 1, 3), "eval", 80),
    ],
    ids=str,
)
def test_a_split_has_no_duplicates(difficulty: Difficulty, split: str, count: int) -> None:
    boards = [v.board for v in take(count, difficulty, 3, split)]
    assert len({min(equal_boards(board)) for board in boards}) == count


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_w": 7},
        {"min_h": 3},
        {"min_boxes": 0},
        {"min_boxes": 2},
        {"max_w": 100, "max_h": 100},
        {"min_boxes_off_goal": 0},
        {"min_boxes_off_goal": 2},
        {"min_moves": 5, "max_moves": 4},
        {"min_moves": 81},
        {"min_pushes": 5, "max_pushes": 4},
        {"max_pushes": 0},
        {"max_depth": 0},
        {"max_depth": None},
        {"max_w": "6"},
        {"max_boxes": 1.5},
    ],
    ids=str,
)
def test_contradictory_bounds_are_refused_at_once(bounds: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        Difficulty(**bounds)
    assert caught.value.exit_code == EXIT_USAGE
    assert any(name in caught.value.what for name in (*bounds, "4 x 4"))


@pytest.mark.parametrize("difficulty", [Difficulty(4, 4, 4, 4), Difficulty(4, 4, 5, 5)], ids=str)
def test_asking_for_more_levels_than_exist_is_refused(difficulty: Difficulty) -> None:
    levels = LevelSet(difficulty, 0, "train", 200)
    for _ in range(2):
        with pytest.raises(UserError, match="no new level") as caught:
            levels.take(range(200))
        assert caught.value.exit_code == EXIT_USAGE
