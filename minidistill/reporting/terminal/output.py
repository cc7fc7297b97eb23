"""A stream whose reader may go away, as after `minidistill run … | head`."""

from __future__ import annotations

import logging
from typing import Any, TextIO

from minidistill.files import drop_output

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
                self._stream.write(text)
            except OSError as error:
                self._drop(error)
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except OSError as error:
                self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        self._gone = True
        drop_output(self._stream)
        # not for the terminal: this is called in the middle of writing to it
        logger.debug(f"the output cannot be written ({error.strerror}): from here on it is dropped")
