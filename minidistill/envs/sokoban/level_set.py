"""The levels of a split: made when they are asked for, and cached on disk if that was slow."""

from __future__ import annotations

import time
from collections.abc import Sequence

from minidistill.envs.sokoban.cache import LevelCache
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.levels import Level, LevelMaker, Recipe
from minidistill.envs.sokoban.workers import make_levels
from minidistill.types import Advance

SLOW_SECONDS = 0.5  # levels are cached when making them has taken longer than this


class LevelSet:
    """Levels by number."""

    def __init__(self, difficulty: Difficulty, seed: int, split: str, count: int) -> None:
        self.count = count
        self.maker = LevelMaker(Recipe.of(difficulty, seed, split, count))
        self.cache = LevelCache(self.maker.recipe)
        self._levels: dict[int, Level] | None = None  # until the first one is asked for
        self._unsaved: dict[int, Level] = {}
        self._seconds = 0.0
        """Spent on the unsaved levels."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Level:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.take([number])[0]

    def take(self, numbers: Sequence[int], advance: Advance = lambda count: None) -> list[Level]:
        """The levels of these numbers. `advance` is called as they become available."""
        if self._levels is None:
            self._levels = self.cache.read()
        levels = self._levels
        missing = [number for number in dict.fromkeys(numbers) if number not in levels]
        advance(len(numbers) - len(missing))
        began = time.perf_counter()
        try:
            for number, level in make_levels(self.maker, missing):
                levels[number] = self._unsaved[number] = level
                advance(1)
        finally:
            self._seconds += time.perf_counter() - began
            if self._seconds > SLOW_SECONDS:
                self.cache.append(self._unsaved)
                self._unsaved, self._seconds = {}, 0.0
        return [levels[number] for number in numbers]
