"""Notes and warnings on standard error, which leave the output to what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from minidistill import logs
from minidistill.error_output import print_to_stderr
from minidistill.errors import printable


@contextlib.contextmanager
def notes_to_stderr() -> Iterator[None]:
    def note(text: str, is_warning: bool) -> None:
        print_to_stderr(printable(f"warning: {text}" if is_warning else text))

    with logs.to_terminal(note):
        yield
