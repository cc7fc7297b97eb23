"""Text files that grow by lines, with a checksum that is kept while they grow."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.files import parse_json, write_atomic, writing

logger = logging.getLogger(__name__)


class Extent(BaseModel, frozen=True, strict=True):
    """How much of a file there was, and the checksum of that."""

    lines: NonNegativeInt
    size: NonNegativeInt
    sha256: str

    def of(self, data: bytes) -> bytes | None:
        """The part of a file's content that is meant, if it is as it was."""
        part = data[: self.size]
        same = len(part) == self.size and hashlib.sha256(part).hexdigest() == self.sha256
        return part if same else None


class LineFile:
    """A text file that grows by whole lines, with a running checksum. Links are not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash: Any = None  # of nothing yet: the file may hold something
        self._lines = self._bytes = 0

    def data(self) -> bytes:
        """The content; empty if there is no file. Raises UserError (exit code 3)."""
        reason = "it is not a file"
        try:
            if not self.path.exists():
                return b""
            if self.path.is_file():  # reading a pipe would never end
                return self.path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
        raise UserError(
            f"cannot read {self.path}: {reason}",
            where=str(self.path),
            fix="restore it from a copy, or start a new run with another --output_dir",
            exit_code=EXIT_ENVIRONMENT,
        )

    def append(self, text: str) -> None:
        """Add lines. Raises UserError (exit code 3) for a full disk."""
        if self._hash is None:
            self._count(self.data())
        data = text.encode()
        with writing(self.path), self._open() as file:
            file.write(data)
        self._add(data)

    def replace(self, data: bytes) -> None:
        """Write the whole content, unless it is that already."""
        if not self.path.is_file() or self.data() != data:
            write_atomic(self.path, data)
        self._count(data)

    def flush(self) -> Extent:
        """Put everything on disk. Returns what there is."""
        if self._hash is None:
            self._count(self.data())
        with writing(self.path), self._open() as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        if size != self._bytes:
            logger.warning(f"another program has changed {self.path}: the run goes on with it")
            self._count(self.data())
        return Extent(lines=self._lines, size=self._bytes, sha256=self._hash.hexdigest())

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_NONBLOCK  # a pipe without a reader is an error, and is not waited for
        return open(os.open(self.path, flags, 0o666), "wb")

    def _count(self, data: bytes) -> None:
        self._hash, self._lines, self._bytes = hashlib.sha256(), 0, 0
        self._add(data)

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self._lines += data.count(b"\n")
        self._bytes += len(data)


def complete_lines(data: bytes) -> list[bytes]:
    """The complete lines. A writer that was killed may have left half of one."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def json_objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines."""
    for line in lines:
        with contextlib.suppress(ValueError):
            value = parse_json(line.decode())
            if isinstance(value, dict):
                yield value
