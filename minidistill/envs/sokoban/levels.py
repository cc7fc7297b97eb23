"""Levels by number: a level depends on its recipe and its number alone.

No two levels of a split are equal, and no level of a split equals one of the other, up to
rotations, reflections and translations. Nothing needs to be compared for that: the split of a level
is a function of its hash, and each number draws from a class of boards of its own. Only where there
are few boards does a class have several numbers, which take its levels one after another
(docs/decisions/0017-levels-by-number.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.difficulty import Difficulty, refusal
from minidistill.envs.sokoban.rooms import RoomClass
from minidistill.envs.sokoban.solver import solve

EVAL_SHARE = 4  # one hash in four belongs to the eval split
SEARCH_STATES = 3000  # a room whose solution needs a longer search is rejected
ATTEMPTS = 20_000  # random rooms to try for one level before giving up
IDLE_ATTEMPTS = 2000  # the same without a new board: the class has no more
AMPLE = 1 << 20  # boards for each level with which classes of one level do
SHARED = 16  # levels of a class otherwise: some classes have few boards


@dataclass(frozen=True, slots=True)
class Level:
    """A board in XSB and a shortest solution."""

    board: str
    solution: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the levels of a split depend on, besides their numbers."""

    difficulty: Difficulty
    seed: int
    split: str
    classes: int
    per_class: int

    @classmethod
    def of(cls, difficulty: Difficulty, seed: int, split: str, count: int) -> Recipe:
        """The recipe of a split with `count` levels.

        The count is rounded up to a power of two, so that the first levels stay the same if a few
        more are asked for.
        """
        levels = 1 << (count - 1).bit_length()
        cells = (difficulty.max_w - 2) * (difficulty.max_h - 2)
        boxes = min(difficulty.max_boxes, cells // 2)
        boards = comb(cells, boxes) ** 2 * cells << cells
        per_class = 1 if boards >= levels * AMPLE else min(SHARED, levels)
        return cls(difficulty, seed, split, levels // per_class, per_class)


class LevelMaker:
    """Makes the levels of a recipe. Those of a class are made one after another."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._classes: dict[int, tuple[list[Level], Iterator[Level]]] = {}

    def make(self, number: int) -> Level:
        """The level of a number, from 0 on. Raises UserError if none is found."""
        class_number, position = divmod(number, self.recipe.per_class)
        if self.recipe.per_class == 1:
            return self._next(self._levels(class_number))
        if class_number not in self._classes:
            self._classes[class_number] = [], self._levels(class_number)
        made, others = self._classes[class_number]
        while len(made) <= position:
            made.append(self._next(others))
        return made[position]

    def _next(self, levels: Iterator[Level]) -> Level:
        level = next(levels, None)
        if level is None:
            raise refusal(
                f"no new level was found for the {self.recipe.split} split",
                "ask for fewer examples or widen the sizes, boxes or move bounds",
            )
        return level

    def _levels(self, class_number: int) -> Iterator[Level]:
        """The different levels of a class, until no more are found."""
        difficulty, split = self.recipe.difficulty, self.recipe.split
        name = f"{self.recipe.seed}/{split}"
        rng = random.Random(f"{name}/{class_number}")
        room_class = RoomClass(class_number, self.recipe.classes, name)
        seen: set[int] = set()
        attempts = idle_attempts = 0
        while attempts < ATTEMPTS and idle_attempts < IDLE_ATTEMPTS:
            attempts, idle_attempts = attempts + 1, idle_attempts + 1
            board = room_class.draw(difficulty, rng)
            if board is None or (key := board.key()) in seen:
                continue
            idle_attempts = 0
            seen.add(key)
            if (key % EVAL_SHARE == 0) != (split == "eval"):
                continue
            solution = solve(board, difficulty.move_limit, SEARCH_STATES)
            if solution is not None and _fits(difficulty, board, solution):
                attempts = 0
                yield Level(board.render(), solution)


def _fits(difficulty: Difficulty, board: Board, solution: str) -> bool:
    pushes, max_pushes = 0, difficulty.max_pushes
    for move in solution:
        after = board.step(move)
        assert after is not None, "the solver made an illegal move"
        pushes += after.boxes != board.boxes
        board = after
    return len(solution) >= difficulty.min_moves and (
        difficulty.min_pushes <= pushes <= (pushes if max_pushes is None else max_pushes)
    )
