"""Sokoban boards: symbols, moves, symmetry.

As text, a board is its rows in XSB notation: `#` wall, `@` player, `+` player on goal, `$` box, `*`
box on goal, `.` goal, space floor. In memory, cells are numbered row by row and a set of cells is a
bit mask, so a state of the game is two integers: the boxes and the player's cell.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

MOVES = "UDLR"
KINDS = ("wall", "player", "player_on_goal", "box", "box_on_goal", "goal", "floor")
XSB = dict(zip(KINDS, "#@+$*. ", strict=True))
RG = dict(zip(KINDS, "+*%@$X-", strict=True))


@dataclass(frozen=True, slots=True)
class Board:
    """A state of a level. `walls`, `goals` and `boxes` are bit masks over the `width * height`
    cells; `player` is a cell."""

    width: int
    height: int
    walls: int
    goals: int
    boxes: int
    player: int
    offsets: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", (-self.width, self.width, -1, 1))

    @classmethod
    def parse(cls, text: str) -> Board:
        """Parse XSB rows. Raises ValueError unless there are one player and a goal for each box."""
        rows = text.strip("\n").split("\n")
        width = max(map(len, rows))
        walls = goals = boxes = 0
        players = []
        for cell, char in enumerate("".join(row.ljust(width, "#") for row in rows)):
            bit = 1 << cell
            if char == "#":
                walls |= bit
            if char in ".+*":
                goals |= bit
            if char in "$*":
                boxes |= bit
            if char in "@+":
                players.append(cell)
            if char not in "#.+*$@ ":
                raise ValueError(f"{char!r} is not an XSB symbol")
        if len(players) != 1 or boxes.bit_count() != goals.bit_count():
            raise ValueError("a board needs one player and as many goals as boxes")
        return cls(width, len(rows), walls, goals, boxes, players[0])

    def kind(self, cell: int) -> str:
        """What is on a cell: one of `KINDS`."""
        bit = 1 << cell
        on_goal = "_on_goal" if self.goals & bit else ""
        if self.walls & bit:
            return "wall"
        if self.boxes & bit:
            return "box" + on_goal
        if self.player == cell:
            return "player" + on_goal
        return "goal" if on_goal else "floor"

    def render(self, symbols: dict[str, str] = XSB, separator: str = "") -> str:
        """The board as text, one line per row."""
        chars = [symbols[self.kind(c)] for c in range(self.width * self.height)]
        rows = (chars[i : i + self.width] for i in range(0, len(chars), self.width))
        return "\n".join(separator.join(row) for row in rows)

    @property
    def solved(self) -> bool:
        return self.boxes == self.goals

    def step(self, move: str) -> Board | None:
        """The board after one of "UDLR", or None if a wall or a blocked box is in the way."""
        offset = self.offsets[MOVES.index(move)]
        target = self.player + offset
        bit = 1 << target
        if self.walls & bit:
            return None
        boxes = self.boxes
        if boxes & bit:
            behind = 1 << (target + offset)
            if (self.walls | boxes) & behind:
                return None
            boxes ^= bit | behind
        return Board(self.width, self.height, self.walls, self.goals, boxes, target)

    def key(self) -> int:
        """A 64-bit hash, equal for boards that differ by a rotation, a reflection or a translation.

        Of walls around the floor, one row or column on each side counts.
        """
        rows = _without_margins(_without_margins(self.render().split("\n")))
        rows = ["#" * len(rows[0]), *rows, "#" * len(rows[0])]
        rows = [f"#{row}#" for row in rows]
        forms = []
        for _ in range(4):
            rows = _transposed(rows[::-1])
            forms += ["\n".join(rows), "\n".join(row[::-1] for row in rows)]
        digest = hashlib.blake2b(min(forms).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def _without_margins(rows: list[str]) -> list[str]:
    """The transposed rows, less the first and last ones that are all wall."""
    wall = "#" * len(rows[0])
    first = next(i for i, row in enumerate(rows) if row != wall)
    last = next(i for i in range(len(rows), 0, -1) if rows[i - 1] != wall)
    return _transposed(rows[first:last])


def _transposed(rows: list[str]) -> list[str]:
    return ["".join(column) for column in zip(*rows, strict=True)]
