"""One owner of a run's directory at a time: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from minidistill.errors import EXIT_ENVIRONMENT, UserError

LOCK = ".lock"
"""The file in a run's directory that is locked. It is there while the run is."""


class LockedError(Exception):
    """Another process has the directory. The message says which one."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run's directory, which is made if there is none.

    What was made is removed at the end if nothing else is in it. Raises LockedError, OSError, and
    UserError (exit code 3) for a file system without locks.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        descriptor = _lock(path / LOCK)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()  # before others can lock it
            os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds a run now, or another one's lock
                folder.rmdir()


def _lock(path: Path) -> int:
    """The descriptor of the locked file, which names this process."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # its last owner has just removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):  # else its last owner has just removed it
                with contextlib.suppress(OSError):  # a full disk: the name is only for messages
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 300).decode(errors="replace")
            os.close(descriptor)
            raise LockedError(f"process {owner}" if owner else "another process") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise UserError(
                f"{path.parent} is on a file system without locks ({error.strerror})",
                where="output_dir",
                fix="choose an output_dir on another one",
                exit_code=EXIT_ENVIRONMENT,
            ) from error
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
