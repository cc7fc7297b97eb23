"""Checks of a reward's arguments."""

from __future__ import annotations

import math

from minidistill.errors import UserError


def refusal(name: str, value: object, fix: str, why: str = "") -> UserError:
    """The error for `reward` (with an empty `name`) or one of its arguments."""
    key = f"reward.{name}" if name else "reward"
    text = repr(value)
    shown = text if len(text) <= 80 else text[:79] + "…"
    what = f"{key} = {shown} cannot be used"
    return UserError(f"{what}: {why}" if why else what, where=f"args.{key}", fix=fix)


def check_text(name: str, value: object) -> None:
    """Raise UserError unless `value` is text and not empty."""
    if not isinstance(value, str) or not value:
        raise refusal(name, value, "give a text that is not empty")


def check_bool(name: str, value: object) -> None:
    """Raise UserError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise refusal(name, value, "use true or false")


def check_count(name: str, value: object) -> None:
    """Raise UserError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(name, value, "use a whole number above 0")


def check_seconds(name: str, value: object) -> None:
    """Raise UserError unless `value` is a number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator, arg-type]
        raise refusal(name, value, "give seconds, a number above 0")
