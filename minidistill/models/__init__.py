"""Models that ship with the package, and where a model's name leads."""

from __future__ import annotations

from pathlib import Path

BUILT_IN = {"tiny-sokoban": Path(__file__).parent / "tiny_sokoban"}


def resolve(name: str) -> str:
    """A built-in model's folder, or the name itself: a local path or a hub id."""
    return str(BUILT_IN.get(name, name))
