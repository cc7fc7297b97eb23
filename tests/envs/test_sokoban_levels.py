"""Generated levels: their bounds, order and splits, and the cache."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.sokoban import brute_force, replay, symmetric

from minidistill.envs.sokoban import levels as levels_module
from minidistill.envs.sokoban.levels import Difficulty, Level, LevelSet
from minidistill.errors import EXIT_USAGE, UserError

SMALL = Difficulty(min_w=5, max_w=6, min_h=5, max_h=6)


def take(
    count: int, difficulty: Difficulty = SMALL, seed: int = 0, split: str = "train"
) -> list[Level]:
    levels = LevelSet(difficulty, seed, split, count)
    return [levels[i] for i in range(count)]


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


def test_a_level_depends_only_on_seed_split_and_index() -> None:
    few, many = take(5), take(40)
    assert many[:5] == few
    backwards = LevelSet(SMALL, 0, "train", 40)
    assert [backwards[i] for i in reversed(range(40))][::-1] == many
    assert not {v.board for v in few} & {v.board for v in take(5, seed=1)}
    with pytest.raises(IndexError):
        backwards[40]
    with pytest.raises(IndexError):
        backwards[-1]


def test_splits_share_no_level_up_to_symmetry() -> None:
    tiny = Difficulty(5, 5, 5, 5)  # few levels exist, so splits could overlap
    train = [v.board for seed in (0, 1) for v in take(60, tiny, seed)]
    evaluation = [v.board for seed in (0, 7) for v in take(25, tiny, seed, "eval")]
    forms = {form for board in train for form in symmetric(board)}
    assert not forms & set(evaluation)
    assert set(train[:60]) & set().union(*map(symmetric, train[60:]))  # other seeds do overlap


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_split_has_no_duplicates(split: str) -> None:
    tiny = Difficulty(5, 5, 5, 5)
    boards = [v.board for v in take(60, tiny, 3, split)]
    assert len({min(symmetric(board)) for board in boards}) == 60


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
    with pytest.raises(UserError, match="no new level") as caught:
        take(200, difficulty)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the cache file of `take()`. All levels count as slow enough to be cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(levels_module, "SLOW_SECONDS", 0.0)
    path = LevelSet(SMALL, 0, "train", 1).cache_path
    assert path.is_relative_to(tmp_path)
    return path


def test_cached_levels_are_not_generated_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = take(4)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    assert take(6)[:4] == fresh
    everything = take(6)

    def refuse(*_: object) -> Level:
        raise AssertionError("generated although it is cached")

    monkeypatch.setattr(levels_module, "generate", refuse)
    assert take(6) == everything
    assert take(2) == fresh[:2]
    for other in ({"seed": 1}, {"split": "eval"}, {"difficulty": Difficulty(max_depth=9)}):
        with pytest.raises(AssertionError, match="although it is cached"):
            take(1, **other)  # type: ignore[arg-type]


def test_fast_levels_are_not_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels_module, "SLOW_SECONDS", 60.0)
    take(4)
    assert not cache.exists()


def changed_cache(**values: object) -> bytes:
    """A cache file with changed values of the second level."""
    lines = [{"board": v.board, "solution": v.solution, "key": v.key} for v in take(3)]
    lines[1] |= values  # type: ignore[arg-type]
    return "\n".join(map(json.dumps, lines)).encode()


@pytest.mark.parametrize(
    "values",
    [
        None,
        {"solution": ""},
        {"solution": "UUUUUUUUUUUU"},
        {"solution": "north"},
        {"key": 1},
        {"board": "#####\n#@$.#\n#####"},
        {"board": 5},
        {"board": ""},
        {"solution": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_cache_is_ignored(cache: Path, values: dict[str, object] | None) -> None:
    fresh = take(5)
    damages = [b"", b"\xff\x00", b"[]\n", b"null\n", cache.read_bytes()[:-20]]
    for damage in damages if values is None else [changed_cache(**values)]:
        cache.write_bytes(damage)
        assert take(5) == fresh


@pytest.mark.parametrize("place", ["file", "/proc/none", "/dev/full/x"])
def test_a_cache_that_cannot_be_written(
    cache: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = take(3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert take(3) == fresh


def test_an_empty_cache_home_means_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LevelSet(SMALL, 0, "train", 1).cache_path.is_relative_to(tmp_path / ".cache")
