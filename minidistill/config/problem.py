"""A contradiction of settings."""

from __future__ import annotations

from typing import NamedTuple

from minidistill.config.schema_tree import Path


class Problem(NamedTuple):
    """A contradiction: what is wrong, how to fix it, and the keys that contradict each other."""

    what: str
    fix: str
    keys: tuple[str | Path, ...]
