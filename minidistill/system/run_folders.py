"""What to say of a path that is no run's directory: the run that may be meant."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from minidistill.errors import UserError

SETTINGS = "config.toml"
"""A folder with this file is a run's directory."""
_SHOWN = 5
"""Runs that an error names."""


def no_run(path: Path, fix: str) -> UserError:
    """The error for `path`: it names runs beside, above or in it, or else says `fix`."""
    return UserError(f"{path} is not a run directory", str(path), runs_near(path) or fix)


def runs_near(path: Path) -> str:
    """What to write in place of `path`: the run that it lies in, one of a like name, or those that
    the folder holds. Empty if there are none."""
    try:
        above = [parent for parent in list(path.parents)[:2] if _is_run(parent)]
        if path.is_dir():
            if above:
                return f"did you mean {above[0]}?"
            return _named(_runs_in(path))
        beside = _runs_in(path.parent)
        close = difflib.get_close_matches(path.name, [run.name for run in beside], 1)
        return f"did you mean {path.parent / close[0]}?" if close else _named(beside)
    except (OSError, ValueError):  # no folder that can be listed, or no name of one
        return ""


def _named(runs: list[Path]) -> str:
    if not runs:
        return ""
    more = ", …" if len(runs) > _SHOWN else ""
    return f"name a run; there are {', '.join(map(str, runs[:_SHOWN]))}{more}"


def _runs_in(folder: Path) -> list[Path]:
    """The newest first."""
    runs = [folder / name for name in os.listdir(folder) if _is_run(folder / name)]
    return sorted(runs, key=lambda run: -(run / SETTINGS).stat().st_mtime)


def _is_run(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()
