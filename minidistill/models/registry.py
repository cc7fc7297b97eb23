"""Models and model configurations that ship with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
BUILT_IN = {"tiny-sokoban": _FOLDER / "tiny_sokoban"}
# Hub models whose configuration ships with the package, so that `plan` works offline
SHIPPED_CONFIGS = {
    name: _FOLDER / "known" / f"{name.replace('/', '--')}.json"
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Instruct-2507")
}


def resolve(name: str) -> str:
    """The folder of a built-in model; any other name (a local path or a hub id) unchanged."""
    return str(BUILT_IN.get(name, name))
