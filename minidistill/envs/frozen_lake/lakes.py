"""Lakes: a square of ice with holes, a start and a goal, and the shortest way between them."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
EVAL_SHARE = 4  # one lake in four belongs to the eval split
ATTEMPTS = 20_000
"""Random lakes without a new one, after which there are no more."""

Cell = tuple[int, int]
"""A row and a column."""


@dataclass(frozen=True, slots=True)
class Lake:
    """`rows` have `_` ice, `O` hole and `G` goal. The player starts on ice."""

    rows: tuple[str, ...]
    start: Cell
    moves: int
    """Of a shortest way to the goal, if the ice is not slippery."""

    def kind(self, cell: Cell) -> str:
        return self.rows[cell[0]][cell[1]]

    def step(self, cell: Cell, move: str) -> Cell | None:
        """The cell that a move leads to, None off the edge."""
        row, column = (at + by for at, by in zip(cell, MOVES[move], strict=True))
        size = len(self.rows)
        return (row, column) if 0 <= row < size and 0 <= column < size else None

    def render(self, player: Cell) -> str:
        """The lake as text with the player, `P`, on a cell."""
        rows = [list(row) for row in self.rows]
        rows[player[0]][player[1]] = "P"
        return "\n".join(" ".join(row) for row in rows)


def lakes(size: int, holes: float, min_moves: int, seed: int, split: str) -> Iterator[Lake]:
    """Different lakes of a split, in an order that depends on the arguments alone.

    No two are equal, and none is in the other split, up to rotations and reflections: a hash
    decides on the split. Ends if `ATTEMPTS` random lakes in a row are not new.
    """
    rng = random.Random(f"frozen-lake {seed} {size} {holes} {min_moves}")
    known: set[int] = set()
    left = ATTEMPTS
    while left:
        left -= 1
        lake = _random_lake(rng, size, holes, min_moves)
        if lake is None or (key := _key(lake)) in known:
            continue
        known.add(key)
        left = ATTEMPTS
        if (key % EVAL_SHARE == 0) == (split == "eval"):
            yield lake


def _random_lake(rng: random.Random, size: int, holes: float, min_moves: int) -> Lake | None:
    cells = [(row, column) for row in range(size) for column in range(size)]
    start, goal = rng.sample(cells, 2)
    kinds = {cell: "O" if rng.random() < holes else "_" for cell in cells}
    kinds |= {start: "_", goal: "G"}
    rows = tuple("".join(kinds[row, column] for column in range(size)) for row in range(size))
    moves = _shortest(Lake(rows, start, 0))
    return None if moves is None or moves < min_moves else Lake(rows, start, moves)


def _shortest(lake: Lake) -> int | None:
    """The moves of a shortest way to the goal; None if there is none."""
    distance = {lake.start: 0}
    queue = deque([lake.start])
    while queue:
        cell = queue.popleft()
        for move in MOVES:
            after = lake.step(cell, move)
            if after is None or after in distance or lake.kind(after) == "O":
                continue
            distance[after] = distance[cell] + 1
            if lake.kind(after) == "G":
                return distance[after]
            queue.append(after)
    return None


def _key(lake: Lake) -> int:
    """A 64-bit hash, equal for lakes that differ by a rotation or a reflection."""
    rows = lake.render(lake.start).replace(" ", "").split("\n")
    forms = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
        forms += ["\n".join(rows), "\n".join(row[::-1] for row in rows)]
    digest = hashlib.blake2b(min(forms).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
