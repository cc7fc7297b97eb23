"""Writing files that survive a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minidistill.errors import EXIT_ENVIRONMENT, UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a lost mount) into a UserError (exit code 3)."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}",
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
