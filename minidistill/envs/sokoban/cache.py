"""Levels on disk: a text file that is only appended to, and whose lines carry checksums.

Several processes may append at the same time, each with one write. A line that was torn, altered or
written for other arguments does not match its checksum: its level is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from minidistill.envs.sokoban.levels import Level, Recipe
from minidistill.system.files import cache_folder


class LevelCache:
    """The cached levels of a recipe. Without a cache runs are slower, so no failure is an error."""

    def __init__(self, recipe: Recipe) -> None:
        bounds = dataclasses.astuple(recipe.difficulty)
        classes = recipe.classes, recipe.per_class
        parts = (*bounds, recipe.seed, recipe.split, *classes, code_version())
        self.name = "-".join(map(str, parts)) + ".txt"

    @property
    def path(self) -> Path:
        return cache_folder("sokoban") / self.name

    def read(self) -> dict[int, Level]:
        """The intact levels by their numbers."""
        try:
            lines = self.path.read_text("utf-8", errors="replace").split("\n")
        except (OSError, RuntimeError):
            return {}
        levels = {}
        for line in lines:
            checksum, _, content = line.partition(" ")
            if checksum == self._checksum(content):
                number, solution, board = content.split(" ", 2)
                levels[int(number)] = Level(board.replace("/", "\n"), solution)
        return levels

    def append(self, levels: Mapping[int, Level]) -> None:
        """Add levels by their numbers."""
        # the first line may follow one that was torn
        lines = ["", *(self._line(number, level) for number, level in levels.items()), ""]
        with contextlib.suppress(OSError, RuntimeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write("\n".join(lines).encode())

    def _line(self, number: int, level: Level) -> str:
        board = level.board.replace("\n", "/")
        content = f"{number} {level.solution} {board}"
        return f"{self._checksum(content)} {content}"

    def _checksum(self, content: str) -> str:
        text = f"{self.name}\n{content}".encode(errors="replace")
        return hashlib.blake2b(text, digest_size=8).hexdigest()


@cache
def code_version() -> str:
    """A hash of the code that levels depend on: this folder's."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
