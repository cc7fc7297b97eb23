"""Writes that fail, in this process: at one of them, as on a full disk, or from it on for ever, as
in a process that is killed there."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minidistill import cli
from minidistill.reporting import run_lock

_NAMES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}
"""Audit events that change a folder, and which of their arguments is the path."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


class Killed(BaseException):
    """The process ended here."""


class _Fault:
    """What the audit hook does. There is one hook for all tests: it cannot be removed."""

    root = ""
    at = 0
    """The number of the write at which it strikes, from 1. 0: it only counts."""
    kills = True

    def __init__(self) -> None:
        self.log: list[str] = []

    @property
    def writes(self) -> int:
        return len(self.log)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.root or (event != "open" and event not in _NAMES):
            return
        path = args[_NAMES.get(event, 0)]
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
            return
        if not isinstance(path, (str, os.PathLike)):
            return
        if not f"{os.path.abspath(path)}/".startswith(f"{self.root}/"):
            return
        self.log.append(f"{event} {os.path.relpath(path, self.root)}")
        if self.at and self.kills and self.writes >= self.at:
            raise Killed
        if self.at == self.writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


_fault = _Fault()
_hooked: list[bool] = []


@contextlib.contextmanager
def write_fails(root: Path, at: int, *, kills: bool) -> Iterator[_Fault]:
    """The write number `at` below `root` fails for want of space, or is the end of the process.

    That ends the block. Files that are opened for writing, made, renamed and removed by Python
    count. Locks of a process that ended are released.
    """
    if not _hooked:
        sys.addaudithook(_fault.hook)
        _hooked.append(True)
    _fault.root, _fault.at, _fault.log, _fault.kills = os.path.abspath(root), at, [], kills
    print_error = cli.print_error

    def unless_killed(error: BaseException) -> int:
        if isinstance(error, Killed):
            raise error
        return print_error(error)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "print_error", unless_killed)
            yield _fault
    except Killed:
        run_lock.release_all()
    finally:
        _fault.root = ""
