"""Random rooms with boxes, goals and a player, in classes that share no board.

The floor of a room is drawn freely. The places of goals, boxes and player on it are numbered, and a
class has every n-th of these numbers. So boards of different classes differ in the floor or in the
places, and a board of one class is drawn without a look at the others. Floors and places are
numbered in a frame that rotations, reflections and translations do not change.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.moves import cells, live_cells
from minidistill.seeding import stable_seed

FLOORS = 32  # to try for a size and a number of boxes
PLACEMENTS = 64  # to try on a floor


@dataclass(frozen=True, slots=True)
class RoomClass:
    """One of `total` classes of boards that share no board. Other seeds divide them otherwise."""

    number: int
    total: int
    seed: str

    def draw(self, difficulty: Difficulty, rng: random.Random) -> Board | None:
        """A board of this class; None if those that were tried cannot be used."""
        width = rng.randint(difficulty.min_w, difficulty.max_w)
        height = rng.randint(difficulty.min_h, difficulty.max_h)
        count = rng.randint(difficulty.min_boxes, difficulty.max_boxes)
        if (width - 2) * (height - 2) < 2 * count + 1:
            return None
        for attempt in range(FLOORS):
            # the class may have no board on a small floor, but more walls make more floors
            density = rng.uniform(0.0, 0.35 + 0.25 * attempt / FLOORS)
            floor = random_floor(width, height, density, rng)
            size = floor.bit_count()
            if size < 2 * count + 1:
                continue
            shape, frames = canonical_frames(floor, width)
            codes = comb(size, count) ** 2 * (size - count)
            first = (self.number + stable_seed(self.seed, count, shape)) % self.total
            choices = (codes - first + self.total - 1) // self.total
            for _ in range(min(PLACEMENTS, choices)):
                code = first + rng.randrange(choices) * self.total
                places = _decode(code, size, count)
                if not _is_first(frames, *places):
                    continue
                goals, boxes = (_on_board(mask, frames[0]) for mask in places[:2])
                if (boxes & ~goals).bit_count() < difficulty.min_boxes_off_goal:
                    continue
                if not boxes & ~live_cells(floor, goals, width):
                    walls = ((1 << width * height) - 1) ^ floor
                    return Board(width, height, walls, goals, boxes, frames[0][places[2]])
            if choices > 0:
                return None
        return None


def random_floor(width: int, height: int, density: float, rng: random.Random) -> int:
    """The largest connected part of a room with random walls, as a mask."""
    unvisited = 0
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            if rng.random() >= density:
                unvisited |= 1 << y * width + x
    best = 0
    while unvisited:
        part, grown = 0, unvisited & -unvisited
        while grown != part:
            part = grown
            grown |= (part << 1 | part >> 1 | part << width | part >> width) & unvisited
        unvisited ^= part
        if part.bit_count() > best.bit_count():
            best = part
    return best


@lru_cache(maxsize=1 << 14)
def canonical_frames(floor: int, width: int) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """The shape of a floor, and the orders of its cells that have this shape.

    The shape is the same for rotations, reflections and translations of the floor: the least of its
    eight forms. A floor with symmetries has several orders.
    """
    numbers = cells(floor)
    top, left = numbers[0] // width, min(cell % width for cell in numbers)
    points = [(cell // width - top, cell % width - left) for cell in numbers]
    bottom, right = points[-1][0], max(x for _, x in points)
    forms = []
    for rows, columns, transposed in ((bottom, right, False), (right, bottom, True)):
        if rows > columns:
            continue  # the other one is less
        turned = [(x, y) for y, x in points] if transposed else points
        for upside_down in (False, True):
            for mirrored in (False, True):
                places = [
                    (rows - y if upside_down else y) * (columns + 1)
                    + (columns - x if mirrored else x)
                    for y, x in turned
                ]
                forms.append(((rows, columns, sorted(places)), places))
    shape = min(form for form, _ in forms)
    frames = tuple(
        tuple(cell for _, cell in sorted(zip(places, numbers, strict=True)))
        for form, places in forms
        if form == shape
    )
    return str(shape), frames


def _decode(code: int, size: int, count: int) -> tuple[int, int, int]:
    """The places of goals and boxes, as masks, and the player's, by the number of a placement."""
    rest, stands = divmod(code, size - count)
    goals, boxes = (_subset(rank, size, count) for rank in divmod(rest, comb(size, count)))
    return goals, boxes, [place for place in range(size) if not boxes >> place & 1][stands]


def _subset(rank: int, size: int, count: int) -> int:
    """The subset of `count` of the numbers below `size` with a rank, as a mask."""
    mask, number = 0, size
    for left in range(count, 0, -1):
        number -= 1
        while (below := comb(number, left)) > rank:
            number -= 1
        rank -= below
        mask |= 1 << number
    return mask


def _on_board(places: int, frame: tuple[int, ...]) -> int:
    """A mask of places in a frame as a mask of cells."""
    return sum(1 << cell for place, cell in enumerate(frame) if places >> place & 1)


def _is_first(frames: tuple[tuple[int, ...], ...], goals: int, boxes: int, player: int) -> bool:
    """Whether no symmetry of the floor leads to lesser places than these, those in `frames[0]`."""
    for frame in frames[1:]:
        place = {cell: i for i, cell in enumerate(frame)}
        moved = tuple(place[cell] for cell in frames[0])
        if (_on_board(goals, moved), _on_board(boxes, moved), moved[player]) < (
            goals,
            boxes,
            player,
        ):
            return False
    return True
