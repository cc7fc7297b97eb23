"""Temporary folders that the next run removes if this process is killed.

The owner of a folder holds a lock on it, which the kernel drops when the process ends, however it
ends. A folder that can be locked belongs to nobody. Names have the host's mark: locks may not reach
another host that shares the file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import secrets
import socket
import stat
import tempfile
import zlib
from multiprocessing.util import Finalize
from pathlib import Path

from minidistill.errors import UserError
from minidistill.system.files import remove, write_atomic, writing

SHARED_MEMORY = Path("/dev/shm")
_SOCKETS = 107 - 37
"""Bytes of a folder's path, of the 107 that a socket's may have."""
_LIST = "shared_memory.json"
# What multiprocessing and vLLM name their segments. Others may be shared with programs that are not
# ours, and torch's (`torch_`) are this process's, from which vLLM's reads.
_SEGMENT = re.compile(r"(psm_|sem\.mp-|vllm_)[^/]+")


class ScratchFolder:
    """A temporary folder of this process, for its user alone.

    Removed by `close`, at the latest when the process ends in order. It remembers segments of
    shared memory, which are removed with it.
    """

    def __init__(self) -> None:
        """Make the folder. Raises UserError (exit code 3) if it cannot be made."""
        self._owner = os.getpid()
        self._lock: int | None = None
        with writing(Path(os.environ.get("TMPDIR", "/tmp")) / _prefix()):
            folder = Path(tempfile.gettempdir())
            while True:
                self.path = folder / f"{_prefix()}{secrets.token_hex(4)}"
                try:
                    os.mkdir(self.path, 0o700)
                    self._lock = lock_folder(self.path)
                except (FileExistsError, FileNotFoundError, BlockingIOError):
                    if not folder.is_dir():
                        raise
                    continue  # another start took it for a leftover, before it was locked
                except OSError:
                    if not self.path.is_dir():
                        raise
                    # without locks on this file system nobody takes it for a leftover
                # after multiprocessing has removed its sockets
                self._at_exit = Finalize(None, self.close, exitpriority=-100)
                return

    @property
    def holds_sockets(self) -> bool:
        """Whether its path is short enough for the sockets of vLLM and multiprocessing."""
        return len(os.fsencode(self.path)) <= _SOCKETS

    def remember_segments(self, group: int) -> None:
        """Remember the shared memory that a process group uses, all of which is the group's own.

        Processes that are killed leave it behind. Call it when they have started.
        """
        names = {*_listed(self.path), *_segments_of(group)}
        with contextlib.suppress(UserError):  # nothing else depends on it
            write_atomic(self.path / _LIST, json.dumps(sorted(names)))

    def close(self) -> None:
        """Remove the folder, and the segments, whose users have ended. Nothing in a fork."""
        if os.getpid() != self._owner:
            return
        self._at_exit.cancel()
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def use_for_multiprocessing() -> None:
    """Have multiprocessing keep its sockets in a scratch folder, until this process ends."""
    settings = getattr(multiprocessing.current_process(), "_config", None)
    if settings is not None and settings.get("tempdir") is None:
        folder = ScratchFolder()
        if folder.holds_sockets:
            settings["tempdir"] = str(folder.path)
        else:
            folder.close()


def sweep() -> None:
    """Remove what processes of this user that were killed have left in the temporary folder."""
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
            with contextlib.suppress(OSError):
                descriptor = lock_folder(path)
                _remove(path)
                os.close(descriptor)


def _prefix() -> str:
    return f"minidistill-{zlib.crc32(socket.gethostname().encode()):08x}-"


def lock_folder(path: Path) -> int:
    """Lock a folder of this user. Returns the descriptor that holds the lock.

    Programs that are started do not inherit it. Raises OSError if the folder is another user's,
    is locked, or has gone.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise FileNotFoundError(f"{path} is another folder now")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: Path) -> None:
    for name in _listed(folder):
        path = SHARED_MEMORY / name
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink()
    remove(folder)


def _listed(folder: Path) -> list[str]:
    """The segments that a folder's owner remembered."""
    try:
        names = json.loads((folder / _LIST).read_bytes())
    except (OSError, ValueError):
        return []
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and _SEGMENT.fullmatch(name)]


def _segments_of(group: int) -> set[str]:
    """The names of the shared memory that the processes of a group have mapped.

    Found by their numbers: a semaphore is mapped under the name that it had first.
    """
    mapped = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(process.name)) == group:
                lines = (process / "maps").read_text(errors="replace").splitlines()
                mapped |= {int(x.split()[4]) for x in lines if f" {SHARED_MEMORY}/" in x}
    names = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(SHARED_MEMORY):
            if entry.inode() in mapped and _SEGMENT.fullmatch(entry.name):
                names.add(entry.name)
    return names
