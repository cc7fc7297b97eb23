"""One owner of a run's directory at a time: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
"""The file in a run's directory that is locked. It is there while the run is."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()
"""Descriptors of this process's locks. A forked process would keep them locked after its end."""

logger = logging.getLogger(__name__)


class LockedError(Exception):
    """Another process has the directory. The message says which one."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run's directory, which is made if there is none.

    On a file system without locks it is held against other runs on this machine, with a warning.
    What was made is removed at the end if nothing else is in it. Raises LockedError and OSError.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        lock = path / LOCK
        try:
            descriptor = _lock(lock)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                f"{path} is on a file system without locks ({error.strerror}): "
                "make sure that no run on another machine uses it"
            )
            lock = _lock_on_this_machine(path)
            descriptor = _lock(lock)
        _held.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _held:  # not in a process that was forked
                try:
                    with contextlib.suppress(OSError):
                        lock.unlink()  # before others can lock it
                finally:
                    _held.remove(descriptor)
                    os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds a run now, or another one's lock
                folder.rmdir()


def is_locked(path: Path) -> bool:
    """Whether a run has the directory. Nothing is made or changed."""
    places = [path / LOCK]
    with contextlib.suppress(OSError):  # there is no such directory
        places.append(_name_on_this_machine(path))
    for lock in places:
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return False


def _lock_on_this_machine(path: Path) -> Path:
    """The file that stands for a directory where its own cannot be locked."""
    with contextlib.suppress(OSError):
        (path / LOCK).unlink()
    return _name_on_this_machine(path)


def _name_on_this_machine(path: Path) -> Path:
    info = path.stat()  # the same for all paths that lead there
    name = f".minidistill-{os.getuid()}-{info.st_dev:x}-{info.st_ino:x}.lock"
    return Path(tempfile.gettempdir()) / name


def _lock(path: Path) -> int:
    """The descriptor of the locked file, which names this process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, flags, 0o644)
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
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def release_all() -> None:
    """Give up all locks of this process, as its end does: their files stay."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=release_all)
