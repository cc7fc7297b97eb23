"""Files: one reader of the text that people write, writes that survive a crash, lost output."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from minidistill.errors import EXIT_ENVIRONMENT, UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


_DEVICE_BYTES = 1 << 20
"""Bytes that are read of a device, which may have no end."""


def read_text(
    path: Path, *, where: str = "", fix: str = "check the path", limit: int | None = None
) -> str:
    """The text of a file in UTF-8, without a byte order mark, and with "\n" for "\r\n".

    Raises UserError: with `where` and `fix` for a file that cannot be read or has more than `limit`
    bytes, and with line and column for bytes that are not UTF-8.
    """
    try:
        data = _read_bytes(path, limit)
    except (OSError, ValueError) as error:  # a ValueError for a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {reason}", where or str(path), fix) from None
    encoding = "it seems to be UTF-16" if data.startswith(_UTF_16) else ""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        before = data[data.rfind(b"\n", 0, error.start) + 1 : error.start]
        what = f"{path} is not UTF-8 text: {encoding or f'the byte 0x{data[error.start]:02x}'}"
        place = f"{path}:{line}, column {len(before.decode('utf-8')) + 1}"
        raise UserError(what, place, "save the file as UTF-8") from None


def _read_bytes(path: Path, limit: int | None) -> bytes:
    if path.is_char_device() or path.is_block_device():
        limit = min(limit or _DEVICE_BYTES, _DEVICE_BYTES)
    with open(path, "rb") as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


class InvalidJsonError(ValueError):
    """Text that is not JSON. `line` and `column` count from 1; 0 is unknown."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line, self.column = line, column


class DuplicateKeyError(InvalidJsonError):
    """A JSON object with a key twice, of which one value would be lost."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises InvalidJsonError."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise InvalidJsonError(error.msg, error.lineno, error.colno) from None
    except InvalidJsonError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting
        raise InvalidJsonError(str(error)) from None


def read_json(path: Path, *, where: str = "", fix: str = "check the path") -> Any:
    """The value of a JSON file. Raises UserError as `read_text` does, and for invalid JSON."""
    try:
        return parse_json(read_text(path, where=where, fix=fix))
    except InvalidJsonError as error:
        place = f"{path}:{error.line}, column {error.column}" if error.line else str(path)
        raise UserError(f"not valid JSON: {error}", place, "correct the file there") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {twice!r} is there twice")
    return value


@contextlib.contextmanager
def writing(
    path: Path, needed: int = 0, then: str = "--resume continues from the last checkpoint"
) -> Iterator[None]:
    """Turn a failed write (a full disk, a lost mount) into a UserError (exit code 3).

    It names the `path`, the `needed` bytes if they are known, and what to do `then`. Also errors of
    libraries that only quote the system's words count.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _disk_errno(error)
        if number is None:
            raise
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix=f"{_repair(number, path, needed)}; {then}",
            exit_code=EXIT_ENVIRONMENT,
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_ERRORS = (*_FULL, errno.EIO, errno.EROFS)


def _disk_errno(error: Exception) -> int | None:
    """The system's number of a failed write, 0 if it is not known; None for another error."""
    if isinstance(error, OSError):
        return error.errno or 0
    text = str(error)
    for number in _DISK_ERRORS:
        if os.strerror(number) in text or f"os error {number})" in text:
            return number
    # writers of libraries that name no other reason; torch's names its source
    written = type(error).__name__ == "SafetensorError" or "inline_container.cc" in text
    return 0 if written or "PytorchStreamWriter" in text else None


def full_disk(error: BaseException) -> UserError | None:
    """The error (exit code 3) for a write that found a full disk, wherever it was; else None."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    path = error.filename if isinstance(error.filename, str) else ""
    fix = (
        _repair(error.errno, Path(path), 0)
        if path
        else "free some space on the disks of the run, of the temporary folder (TMPDIR) and of "
        "your home"
    )
    return UserError(
        f"cannot write {path or 'a file'}: {error.strerror}",
        where=path,
        fix=f"{fix}; --resume continues from the last checkpoint",
        exit_code=EXIT_ENVIRONMENT,
    )


def _repair(number: int, path: Path, needed: int) -> str:
    """What to do about a failed write."""
    if number == errno.EFBIG:
        return "raise the limit on the size of files (`ulimit -f`)"
    if number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit on open files (`ulimit -n`)"
    if number in (errno.EACCES, errno.EPERM):
        return f"give this user the right to write in {path.parent}"
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENXIO, errno.ELOOP):
        return f"remove what is in the place of {path}"
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or repair the disk"
    folder = next(p for p in path.absolute().parents if p.is_dir())
    amount = f"at least {_readable(needed)}" if needed else "some space"
    place = f"free {amount} on the disk of {folder}"
    if number == errno.EDQUOT:
        return f"{place}, of which your quota is used up"
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        if disk.f_files and not disk.f_favail:
            return f"{place}: it has no room for more files (`df -i`)"
        place += f", which has {_readable(disk.f_bavail * disk.f_frsize)}"
    return place


def _readable(size: int) -> str:
    """A number of bytes, in the largest unit of which there is at least one."""
    amount, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"


_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nothing has, for what is renamed to `path` when it is complete."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a path has a name that `temporary_name` gives."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder, which must have no other writer."""
    with contextlib.suppress(OSError):
        for path in [p for p in folder.iterdir() if is_temporary(p)]:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a temporary file, flush it to disk, rename it: readers see the old file or the new.

    The temporary file has a name of its own, and is removed if it cannot be written. A link at
    `path` is replaced, not followed: what it leads to does not change. Raises UserError (exit code
    3) if the file cannot be written.
    """
    temporary = temporary_name(path)
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with writing(path):
        # exclusive: never an existing file, never through a link; the umask applies
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        flush(path.parent)


def shown_path(path: Path) -> str:
    """A path for people: relative if it is below the current directory."""
    with contextlib.suppress(OSError, ValueError):  # that may have gone, or be another one
        return str(path.relative_to(Path.cwd()))
    return str(path)


def flush(path: Path) -> None:
    """Flush a file to disk, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, which need not exist. Raises RuntimeError without a home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return home / "minidistill" / name


def drop_output(stream: TextIO) -> None:
    """Connect a stream to nothing, also for what it still holds when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, stream.fileno())
        finally:
            os.close(nothing)


def open_standard_streams() -> None:
    """Connect standard streams that are closed to nothing: files would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # `open` takes the lowest number that is free, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
