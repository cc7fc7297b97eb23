"""A folder that is there when it is complete, and of which nothing stays if this is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minidistill.system.files import is_temporary, remove, temporary_name, writing
from minidistill.system.scratch import lock_folder

MARK = ".minidistill-export"
"""The file that tells a folder in progress from others of such a name."""


@contextlib.contextmanager
def made_aside(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which becomes it at the end. Raises UserError if that cannot be.

    It is locked while it is made. What others, who were killed, have left there is removed.
    """
    with writing(target, then="export again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        aside, lock = _new(target)
        try:
            (aside / MARK).touch()
            yield aside
            if target.is_dir():
                target.rmdir()  # empty
            os.replace(aside, target)
            (target / MARK).unlink()
        except BaseException:
            remove(aside)
            raise
        finally:
            os.close(lock)


def _new(target: Path) -> tuple[Path, int]:
    """An empty folder and the descriptor of its lock."""
    while True:
        aside = temporary_name(target)
        aside.mkdir()
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return aside, lock_folder(aside)
        # another export took it for a leftover, before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove what was killed: folders of such a name with the mark or nothing in them, if nobody
    has locked them."""
    with contextlib.suppress(OSError):
        for path in [p for p in folder.iterdir() if is_temporary(p) and p.is_dir()]:
            with contextlib.suppress(OSError):
                lock = lock_folder(path)
                try:
                    if (path / MARK).is_file() or not any(path.iterdir()):
                        remove(path)
                finally:
                    os.close(lock)
