"""The bounds of a level."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minidistill.errors import UserError


def refusal(what: str, fix: str) -> UserError:
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
                raise refusal(f"{name} = {value!r} is not a whole number", f"correct {name}")
        for name in ("w", "h", "boxes", "moves", "pushes"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if high is not None and low > high:
                what = f"min_{name} = {low} is above max_{name} = {high}"
                raise refusal(what, f"choose min_{name} <= max_{name}")
        if self.min_moves > self.max_depth:
            what = f"min_moves = {self.min_moves} is above max_depth = {self.max_depth}"
            raise refusal(what, "choose min_moves <= max_depth")
        if min(self.min_w, self.min_h) < 4 or self.min_boxes < 1 or self.max_w * self.max_h > 4096:
            raise refusal(
                "a level needs at least 4 x 4 cells (walls included), one box, "
                "and at most 4096 cells",
                "raise min_w, min_h or min_boxes, or lower max_w or max_h",
            )
        # with no box off its goal, an empty answer would solve the level
        if not 1 <= self.min_boxes_off_goal <= self.max_boxes:
            raise refusal(
                f"min_boxes_off_goal = {self.min_boxes_off_goal} cannot be met",
                f"choose 1 to max_boxes = {self.max_boxes}",
            )

    @property
    def move_limit(self) -> int:
        return self.max_depth if self.max_moves is None else min(self.max_depth, self.max_moves)
