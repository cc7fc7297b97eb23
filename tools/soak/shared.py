"""Shared memory that a soak's runs leave, told from what other programs make at the same time.

Where the system allows it, the soak has a /dev/shm of its own, and all that is left there is its
runs' (`make_private`). Elsewhere a segment is a run's if a process of the run has held it, which is
looked up again and again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

FOLDER = Path("/dev/shm")
LOOK = 0.05  # seconds between two looks at what a run's processes hold
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # flags of unshare(2)
RECURSIVE, PRIVATE = 0x4000, 0x40000  # flags of mount(2)

_private = False


def make_private() -> bool:
    """Give this process, and what it starts from now on, a /dev/shm of its own, if it may have one.

    It is called before there are other threads. The system removes it when they have all ended.
    """
    global _private
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS) != 0:  # which root may; others may in a user namespace of theirs
        if libc.unshare(NEW_MOUNTS | NEW_USER) != 0:
            return False
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    kept_here = libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None) == 0
    place = os.fsencode(FOLDER)
    _private = kept_here and libc.mount(b"tmpfs", place, b"tmpfs", 0, b"mode=1777") == 0
    return _private


def describe() -> str:
    """How a run's segments are told from others."""
    if _private:
        return "the soak has a /dev/shm of its own"
    return f"a segment is a run's if its processes hold it, which is looked up every {LOOK:g} s"


class Segments:
    """The segments that one run makes."""

    def __init__(self, processes: Callable[[], list[tuple[int, str]]]) -> None:
        """`processes` finds the run's. Make it before the run starts."""
        self._processes = processes
        self._before = _numbers()
        self._held: set[int] = set()

    def look(self) -> None:
        """Remember what the run's processes hold now. Call it every `LOOK` seconds."""
        if not _private:
            for process, _ in self._processes():
                self._held |= _held(Path(f"/proc/{process}"))

    def left(self) -> list[str]:
        """The names of the run's segments that are there."""
        new = {name: number for name, number in _numbers().items() if name not in self._before}
        return sorted(name for name, number in new.items() if _private or number in self._held)


def _numbers() -> dict[str, int]:
    """The inodes of all segments: a semaphore is mapped under the name that it had first."""
    with contextlib.suppress(OSError):
        return {entry.name: entry.inode() for entry in os.scandir(FOLDER)}
    return {}


def _held(process: Path) -> set[int]:
    """The inodes of the segments that a process has mapped or opened."""
    held = set()
    with contextlib.suppress(OSError):  # it has ended
        lines = (process / "maps").read_text(errors="replace").splitlines()
        held |= {int(line.split()[4]) for line in lines if f" {FOLDER}/" in line}
        for file in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(file).startswith(f"{FOLDER}/"):
                    held.add(file.stat().st_ino)
    return held
