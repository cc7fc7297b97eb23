"""Seeded levels of bounded difficulty, in two splits that never share a level.

The split of a level is a function of its hash, which is the same for its rotations and mirror
images. So no train level equals an eval level, even rotated or mirrored, whatever the seeds and
counts. Within a split there are no duplicates either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minidistill.envs.sokoban.board import Board
from minidistill.envs.sokoban.solver import UNREACHABLE, push_distances, solve
from minidistill.errors import UserError

EVAL_SHARE = 4  # one hash in four belongs to the eval split
ATTEMPTS = 20_000  # random rooms to try for one level before giving up
SEARCH_STATES = 100_000  # a room whose solution needs a longer search is rejected
SLOW_SECONDS = 2.0  # levels that took longer than this to generate are cached on disk


def _refusal(what: str, fix: str) -> UserError:
    return UserError(f"sokoban-env: {what}", where="args", fix=fix)


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Bounds of a level. Sizes include the outer walls; `max_depth` caps the solution's moves."""

    min_w: int = 6
    max_w: int = 6
    min_h: int = 6
    max_h: int = 6
    min_boxes: int = 1
    max_boxes: int = 1
    max_depth: int = 80
    min_moves: int = 1
    max_moves: int | None = None
    min_pushes: int = 1
    max_pushes: int | None = None
    min_boxes_off_goal: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            open_ended = value is None and name in ("max_moves", "max_pushes")
            if not (isinstance(value, int) or open_ended):
                raise _refusal(f"{name} = {value!r} is not a whole number", f"correct {name}")
        for name in ("w", "h", "boxes", "moves", "pushes"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if high is not None and low > high:
                what = f"min_{name} = {low} is above max_{name} = {high}"
                raise _refusal(what, f"choose min_{name} <= max_{name}")
        if self.min_moves > self.max_depth:
            what = f"min_moves = {self.min_moves} is above max_depth = {self.max_depth}"
            raise _refusal(what, "choose min_moves <= max_depth")
        if min(self.min_w, self.min_h) < 4 or self.min_boxes < 1 or self.max_w * self.max_h > 4096:
            raise _refusal(
                "a level needs at least 4 x 4 cells (walls included), one box, "
                "and at most 4096 cells",
                "raise min_w, min_h or min_boxes, or lower max_w or max_h",
            )
        # with no box off its goal, an empty answer would solve the level
        if not 1 <= self.min_boxes_off_goal <= self.max_boxes:
            raise _refusal(
                f"min_boxes_off_goal = {self.min_boxes_off_goal} cannot be met",
                f"choose 1 to max_boxes = {self.max_boxes}",
            )

    @property
    def move_limit(self) -> int:
        return self.max_depth if self.max_moves is None else min(self.max_depth, self.max_moves)


@dataclass(frozen=True, slots=True)
class Level:
    """A board in XSB and a shortest solution."""

    board: str
    solution: str
    key: int


def generate(difficulty: Difficulty, seed: int, split: str, index: int, taken: set[int]) -> Level:
    """The level of (seed, split, index). Its key is not in `taken`.

    Raises UserError if no level within the difficulty is found.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    for _ in range(ATTEMPTS):
        board = _room(difficulty, rng)
        if board is None:
            continue
        key = board.key()
        if (key % EVAL_SHARE == 0) != (split == "eval") or key in taken:
            continue
        solution = solve(board, difficulty.move_limit, SEARCH_STATES)
        if solution is not None and _fits(difficulty, board, solution):
            return Level(board.render(), solution, key)
    raise _refusal(
        f"no new level in {ATTEMPTS} tries for {split} level {index}",
        "ask for fewer examples or widen the sizes, boxes or move bounds",
    )


def _room(difficulty: Difficulty, rng: random.Random) -> Board | None:
    """A random connected room with boxes, goals and a player; None if they do not fit."""
    width = rng.randint(difficulty.min_w, difficulty.max_w)
    height = rng.randint(difficulty.min_h, difficulty.max_h)
    count = rng.randint(difficulty.min_boxes, difficulty.max_boxes)
    density = rng.uniform(0.0, 0.35)
    inside = [y * width + x for y in range(1, height - 1) for x in range(1, width - 1)]
    floor = {c for c in inside if rng.random() >= density}
    floor = _largest_component(floor, width)
    if len(floor) < 2 * count + 1:
        return None
    cells = sorted(floor)
    walls = ((1 << width * height) - 1) ^ sum(1 << c for c in cells)
    goals = rng.sample(cells, count)
    empty = Board(width, height, walls, sum(1 << c for c in goals), 0, cells[0])
    distance = push_distances(empty)
    live = [c for c in cells if distance[c] < UNREACHABLE]  # a box can reach a goal from here
    if len(live) < count:
        return None
    boxes = rng.sample(live, count)
    if len(set(boxes) - set(goals)) < difficulty.min_boxes_off_goal:
        return None
    player = rng.choice([c for c in cells if c not in boxes])
    return dataclasses.replace(empty, boxes=sum(1 << c for c in boxes), player=player)


def _largest_component(floor: set[int], width: int) -> set[int]:
    best: set[int] = set()
    unvisited = set(floor)
    while unvisited:
        stack = [unvisited.pop()]
        component = set(stack)
        while stack:
            cell = stack.pop()
            for neighbor in (cell - width, cell + width, cell - 1, cell + 1):
                if neighbor in unvisited:
                    unvisited.discard(neighbor)
                    component.add(neighbor)
                    stack.append(neighbor)
        # ties go to the smallest cell, so that the result does not depend on a set's order
        if (len(component), -min(component)) > (len(best), -min(best, default=0)):
            best = component
    return best


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


class LevelSet:
    """The levels of a split, generated on first access and cached on disk if that was slow."""

    def __init__(self, difficulty: Difficulty, seed: int, split: str, count: int) -> None:
        self.difficulty, self.seed, self.split, self.count = difficulty, seed, split, count
        self._levels: list[Level] = []
        self._taken: set[int] = set()
        self._seconds = 0.0
        for level in self._read_cache():
            self._add(level)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Level:
        if not 0 <= index < self.count:
            raise IndexError(index)
        began = time.perf_counter()
        before = len(self._levels)
        while len(self._levels) <= index:
            position = len(self._levels)
            self._add(generate(self.difficulty, self.seed, self.split, position, self._taken))
        self._seconds += time.perf_counter() - began
        if self._seconds > SLOW_SECONDS and len(self._levels) > before:
            self._write_cache()
            self._seconds = 0.0
        return self._levels[index]

    def _add(self, level: Level) -> None:
        self._levels.append(level)
        self._taken.add(level.key)

    @property
    def cache_path(self) -> Path:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        bounds = "-".join(str(v) for v in dataclasses.astuple(self.difficulty))
        return home / "minidistill" / "sokoban" / f"v1-{bounds}-{self.seed}-{self.split}.jsonl"

    def _read_cache(self) -> list[Level]:
        try:
            lines = self.cache_path.read_text().splitlines()[: self.count]
            levels = [Level(**json.loads(line)) for line in lines]
            return levels if all(map(_is_valid, levels)) else []
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError):
            return []  # no cache, or a damaged one: generate the levels

    def _write_cache(self) -> None:
        lines = "".join(json.dumps(dataclasses.asdict(v)) + "\n" for v in self._levels)
        # without a cache the next run is slower, so a failed write is not an error
        with contextlib.suppress(OSError, RuntimeError):
            path = self.cache_path
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as aside:
                (Path(aside) / path.name).write_text(lines)
                os.replace(Path(aside) / path.name, path)


def _is_valid(level: Level) -> bool:
    """Whether a level read from disk is intact: its hash matches, and its solution solves it."""
    board = Board.parse(level.board)
    if board.key() != level.key:
        return False
    for move in level.solution:
        after = board.step(move)
        if after is None:
            return False
        board = after
    return board.solved
