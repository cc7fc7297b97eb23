"""How the base of an exported adapter is named: in the folder, and in commands on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from minidistill.export.source import Source
from minidistill.models.registry import resolve
from minidistill.system.files import shown_path

_IN_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)$")
"""The path of a model in the hub's cache."""


@dataclass(frozen=True, slots=True)
class Base:
    """The names of a base. Nothing that is written has a path of this machine in full."""

    written: str
    """Its id on the hub. For a folder its path from the exported folder, which programs find if
    that is their current directory."""
    here: str
    """The same id, or the folder's path, which is relative below the current directory."""
    on_hub: bool
    revision: str | None = None

    @property
    def title(self) -> str:
        """A name for people."""
        return self.written if self.on_hub else Path(self.here).name


def name_base(source: Source, target: Path, given: str | None) -> Base:
    """The names of a source's base for an export to the folder `target`. `given` replaces them."""
    if given is not None:
        return Base(given, given, not Path(given).expanduser().is_dir())
    if not source.base_is_local:
        return Base(source.base, source.base, True, source.config.model.revision)
    path = Path(os.path.abspath(Path(resolve(source.base)).expanduser()))
    if (match := _IN_CACHE.search(str(path))) is not None:
        return Base(f"{match[1]}/{match[2]}", shown_path(path), True, match[3])
    # `..` leads out of the folder that a link leads to
    folder = Path(os.path.realpath(target.parent)) / target.name
    return Base(os.path.relpath(os.path.realpath(path), folder), shown_path(path), False)
