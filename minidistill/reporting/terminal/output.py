"""A stream whose reader may go away, as after `minidistill run … | head`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from minidistill.system.files import drop_output
from minidistill.system.symbols import encodable

logger = logging.getLogger(__name__)


class Output:
    """Writes to a stream until that fails, and drops the text from then on.

    The output is not worth a run: the run goes on to its end, and its log says so.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(encodable(text, self._stream))
            except (OSError, ValueError) as error:  # a ValueError for a closed stream
                self._drop(error)
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:  # a ValueError for a closed stream
                self._drop(error)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError | ValueError) -> None:
        self._gone = True
        drop_output(self._stream)
        # not for the terminal: this is called in the middle of writing to it
        reason = getattr(error, "strerror", None) or error
        logger.debug(f"the output cannot be written ({reason}): from here on it is dropped")


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """What anybody prints meanwhile may get lost, and fails nothing: libraries print too."""
    output, errors = (cast(TextIO, Output(stream)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        yield
