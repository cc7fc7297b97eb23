"""Models and model configurations that ship with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
BUILT_IN = {"tiny-sokoban": _FOLDER / "tiny_sokoban", "tiny-lake": _FOLDER / "tiny_lake"}
# Hub models whose configuration ships with the package, so that `plan` works offline
SHIPPED_CONFIGS = {
    path.stem.replace("--", "/"): path for path in sorted((_FOLDER / "known").glob("*.json"))
}


def resolve(name: str) -> str:
    """The folder of a built-in model; any other name (a local path or a hub id) unchanged."""
    return str(BUILT_IN.get(name, name))
