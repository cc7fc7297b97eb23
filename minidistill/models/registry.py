"""Models that ship with the package, and what a model's name resolves to."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
BUILT_IN = {"tiny-sokoban": _HERE / "tiny_sokoban"}
# Hub models whose configuration ships too, so that `plan` needs no hub
KNOWN = {
    name: _HERE / "known" / f"{name.replace('/', '--')}.json"
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Instruct-2507")
}


def resolve(name: str) -> str:
    """A built-in model's folder, or the name itself: a local path or a hub id."""
    return str(BUILT_IN.get(name, name))
