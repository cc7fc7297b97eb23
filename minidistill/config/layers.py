"""Settings laid over each other, with the place where each was written."""

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
    for part, child in _children(value):
        yield from nodes(child, (*path, part))


def leaves(value: Any) -> Iterator[tuple[Path, Any]]:
    """The settings in `value`: everything but filled tables and lists of tables."""
    return ((path, node) for path, node in nodes(value) if not _children(node))


def _children(value: Any) -> list[tuple[Part, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return list(enumerate(value))
    return []


class Layers:
    """The merged settings. Later layers win, tables merge, everything else is replaced."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins: dict[Path, str] = {}

    def put(self, path: Path, value: Any, origin: Origin) -> None:
        """Lay `value` over what is at `path`; `origin` says where a path was written."""
        current = self.get(path)
        if isinstance(value, dict) and isinstance(current, dict):
            self.origins.setdefault(path, origin(path))
            for key, child in value.items():
                self.put((*path, key), child, origin)
            return
        if isinstance(current, dict | list):
            for replaced in [other for other in self.origins if other[: len(path)] == path]:
                del self.origins[replaced]
        self._set(path, copy.deepcopy(value), origin)
        for written, _ in nodes(value, path):
            self.origins[written] = origin(written)

    def get(self, path: Path) -> Any:
        """What is at `path`, or None."""
        node: Any = self.data
        for part in path:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node

    def origin(self, path: Path) -> str:
        """Where `path`, or else the innermost table around it, was written; may be empty."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""

    def _set(self, path: Path, value: Any, origin: Origin) -> None:
        """Set what is at `path`, and create or replace what is in the way."""
        node: Any = self.data
        for depth, part in enumerate(path):
            is_last = depth == len(path) - 1
            new: Any = value if is_last else [] if isinstance(path[depth + 1], int) else {}
            if isinstance(part, int):
                if part > len(node):
                    raise UserError(
                        f"{dotted(path[:depth])} has no entry {part}",
                        where=origin(path),
                        fix=f"entries count from 0; {len(node)} adds one",
                    )
                if part == len(node):
                    node.append(new)
            elif not is_last and not isinstance(node.get(part), type(new)):
                node[part] = new
            if is_last:
                node[part] = value
            node = node[part]
