"""Refusing an environment's arguments."""

from __future__ import annotations

from minidistill.errors import UserError


def argument_refusal(
    id: str, name: str, value: object, fix: str, *, names_argument: bool = False
) -> UserError:
    """The error for an argument of the environment `id`. Its place is the table `args`, or with
    `names_argument` the argument itself."""
    where = f"args.{name}" if names_argument else "args"
    return UserError(f"{id}: {name} = {value!r} cannot be used", where=where, fix=fix)


def require_argument(
    id: str,
    condition: bool,
    name: str,
    value: object,
    fix: str,
    *,
    names_argument: bool = False,
) -> None:
    """Raise `argument_refusal` unless the condition holds."""
    if not condition:
        raise argument_refusal(id, name, value, fix, names_argument=names_argument)
