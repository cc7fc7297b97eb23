"""Validation errors in the user's terms: where, which key, what was given, what is allowed."""

from __future__ import annotations

from pydantic import ValidationError

from minidistill.config import prime_rl as hints
from minidistill.config.layers import Layers
from minidistill.config.schema_tree import Part, Path, child, describe, locate, properties, root
from minidistill.config.toml import dotted, inline
from minidistill.errors import UserError, UserErrors, printable


def shown(value: object, limit: int = 60) -> str:
    """A value as TOML on one line, cut to a readable length."""
    text = inline(value)
    return printable(text if len(text) <= limit else text[: limit - 1] + "…")


def place(origin: str, path: Path) -> str:
    """`file:line, key`, or the flag, which names its key already."""
    if origin.startswith("--"):
        return origin
    return f"{origin}, {dotted(path)}" if origin else dotted(path)


def unknown_key(path: Path, origin: str, given: str = "") -> UserError:
    """A key that the schema does not have: refused with what to write instead."""
    key = dotted(path)
    instead, near = hints.for_key(path), hints.nearest(path)
    if instead:
        what = f"{key}{given} is not a setting of minidistill"
    else:
        what = f"there is no {key}{given}"
        instead = f"did you mean `{near}`?" if near else _siblings(path)
    return UserError(what, place(origin, path), instead)


def _siblings(path: Path) -> str:
    for length in range(len(path) - 1, -1, -1):
        found = locate(path[:length])
        if found is not None:
            table = f"[{dotted(found[0])}]" if length else "the top level"
            return f"{table} takes: {', '.join(properties(found[1]))}"
    return ""


def from_validation(error: ValidationError, layers: Layers, files: str) -> UserError:
    """Every problem pydantic found, one for each key, the first few shown."""
    found: dict[Path, UserError] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path = _known_part(detail["loc"])
        if detail["type"] == "extra_forbidden":
            path = (*path, detail["loc"][-1])
            given = f" = {shown(detail['input'])}" if _is_scalar(detail["input"]) else ""
            found.setdefault(path, unknown_key(path, layers.origin(path), given))
        elif detail["type"] == "missing":
            key = dotted(path)
            origin = layers.origin(path) or files
            problem = UserError(f"{key} is required", place(origin, path), hints.for_missing(key))
            found.setdefault(path, problem)
        elif detail["type"] != "default_factory_not_called":
            found.setdefault(path, _bad_value(path, layers))
    # a table that may also be `false` is reported with what is wrong inside it: say that alone
    deepest = [
        p for path, p in found.items() if not any(path == o[: len(path)] != o for o in found)
    ]
    return UserErrors(deepest) if len(deepest) > 1 else deepest[0]


def _bad_value(path: Path, layers: Layers) -> UserError:
    key, value = dotted(path), layers.get(path)
    located = locate(path)
    allowed = describe(located[1]) if located else ""
    instead = hints.for_value(key, value)
    if "list of tables" in allowed and isinstance(value, dict):
        instead = f"write [[{key}]] with two brackets"
    what = f"{key} = {shown(value)} is not allowed; it takes {allowed}"
    return UserError(what, place(layers.origin(path), path), instead or f"give {allowed}")


def _known_part(loc: tuple[Part, ...]) -> Path:
    """A location without the names pydantic adds for the members of a union."""
    node = root()
    path: Path = ()
    for part in loc:
        below = child(node, part)
        if below is not None:
            node, path = below, (*path, part)
    return path


def _is_scalar(value: object) -> bool:
    return not isinstance(value, dict | list) and value is not None
