"""Modules in the current directory, for the configuration and for code that lies there itself.

The directory is not on `sys.path`, where a file in it would stand for any optional package that is
not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import FrameType, ModuleType

NAMES = "MINIDISTILL_MODULES"
"""The environment variable with a subprocess's folder, and the modules that it finds there."""
_IMPORTING = ("importlib", "_frozen_importlib", "_frozen_importlib_external")
"""Packages that import for others."""


class _Finder:
    """Finds modules and packages in a folder, after all others."""

    def __init__(self, folder: str, names: set[str]) -> None:
        self.folder = folder
        self.names = names
        """What anybody may import: the configuration's, and what has been found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None:  # within a package, which knows where it lies
            return None
        if name not in self.names and _importer(sys._getframe(1)) not in self.names:
            return None
        spec = PathFinder.find_spec(name, [self.folder])
        if spec is not None:
            self.names.add(name)
        return spec


def find_in_current_directory(name: str) -> None:
    """If only the current directory has this module or package, have it found there.

    So is what it imports from there, and what that imports.
    """
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it has gone
        return
    if folder in sys.path or name in sys.modules or find_spec(name) is not None:
        return
    _find(folder, {name})


def variables() -> dict[str, str]:
    """The environment variables with which a subprocess finds what this process does."""
    if not (finders := _finders()):
        return {}
    finder = finders[-1]
    return {NAMES: os.pathsep.join([finder.folder, *sorted(finder.names)])}


def take_over() -> None:
    """In a subprocess: find what `variables` says."""
    folder, *names = os.environ.pop(NAMES, "").split(os.pathsep)
    if names:
        _find(folder, set(names))


def _find(folder: str, names: set[str]) -> None:
    for finder in _finders():
        if finder.folder == folder:
            finder.names |= names
            return
    sys.meta_path.append(_Finder(folder, names))


def _finders() -> list[_Finder]:
    return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]


def _importer(frame: FrameType | None) -> str:
    """The module or package whose code imports something, in a call from `frame`."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _IMPORTING:
            return package
        frame = frame.f_back
    return ""
