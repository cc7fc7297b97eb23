"""Writing files that survive a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minidistill.errors import EXIT_ENVIRONMENT, UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a lost mount) into one clear error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}",
            where=str(path),
            fix="make room or repair the disk; --resume goes on from the last checkpoint",
            exit_code=EXIT_ENVIRONMENT,
        ) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(aside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
