"""Layers of settings on top of each other, remembering where each came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from minidistill.config.schema_tree import Part, Path
from minidistill.config.toml import dotted
from minidistill.errors import UserError

Origin = Callable[[Path], str]


def nodes(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """`value` and everything below it, through tables and lists of tables."""
    yield path, value
    for part, below in _below(value):
        yield from nodes(below, (*path, part))


def leaves(value: Any) -> Iterator[tuple[Path, Any]]:
    """The settings in `value`: what is neither a filled table nor a list of tables."""
    return ((path, found) for path, found in nodes(value) if not _below(found))


def _below(value: Any) -> list[tuple[Part, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return list(enumerate(value))
    return []


class Layers:
    """The merged settings. Later beats earlier, tables merge, everything else is replaced."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins: dict[Path, str] = {}

    def put(self, path: Path, value: Any, origin: Origin) -> None:
        """Lay `value` over what is at `path`; `origin` says where a path was written."""
        there = self.get(path)
        if isinstance(value, dict) and isinstance(there, dict):
            self.origins.setdefault(path, origin(path))
            for key, below in value.items():
                self.put((*path, key), below, origin)
            return
        for old in [old for old in self.origins if old[: len(path)] == path]:
            del self.origins[old]
        self._set(path, copy.deepcopy(value), origin)
        for below_path, _ in nodes(value, path):
            self.origins[below_path] = origin(below_path)

    def get(self, path: Path) -> Any:
        """What is at `path`, or None."""
        here: Any = self.data
        for part in path:
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                return None
        return here

    def origin(self, path: Path) -> str:
        """Where `path`, or else the nearest table that holds it, was written; may be empty."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""

    def _set(self, path: Path, value: Any, origin: Origin) -> None:
        here: Any = self.data
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            new: Any = value if last else [] if isinstance(path[depth + 1], int) else {}
            if isinstance(part, int):
                if part > len(here):
                    raise UserError(
                        f"{dotted(path[:depth])} has no entry {part}",
                        where=origin(path),
                        fix=f"entries count from 0; {len(here)} adds one",
                    )
                if part == len(here):
                    here.append(new)
            elif not last:
                fits = isinstance(here.get(part), type(new))
                here[part] = here[part] if fits else new
            if last:
                here[part] = value
            here = here[part]
