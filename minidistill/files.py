"""Files: one reader of the text that people write, writes that survive a crash, lost output."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from minidistill.errors import EXIT_ENVIRONMENT, UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, *, where: str = "", fix: str = "check the path") -> str:
    """The text of a file in UTF-8, without a byte order mark, and with "\n" for "\r\n".

    Raises UserError: with `where` and `fix` for a file that cannot be read, and with line and
    column for bytes that are not UTF-8.
    """
    try:
        data = path.read_bytes()
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


def _safetensor_error() -> type[Exception]:
    """What safetensors raises if it cannot write a file."""
    from safetensors import SafetensorError

    return SafetensorError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a lost mount) into a UserError (exit code 3)."""
    try:
        yield
    except (OSError, _safetensor_error()) as error:
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix="free some space or repair the disk; --resume continues from the last checkpoint",
            exit_code=EXIT_ENVIRONMENT,
        ) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a temporary file, flush it to disk, rename it: readers see the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


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
