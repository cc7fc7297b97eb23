"""Where warnings and notes go: the terminal, the run's log, or a list on the trainer's other ranks.

Every module has `logger = logging.getLogger(__name__)`. The levels mean:

- WARNING: shown in the terminal as a warning and written to `logs/run.log`
- INFO: a note, shown in the terminal and written to `logs/run.log`
- DEBUG: written to `logs/run.log` only, tracebacks (`exc_info=error`) among them
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from minidistill.errors import bounded, printable

ROOT = "minidistill"
"""The logger above those of all modules."""
UNWRITTEN = 1000
"""Records kept for a log file that cannot be written yet."""
LONGEST_RECORD = 50_000
"""Characters of a record, a traceback among them."""

logger = logging.getLogger(__name__)

_DATE = "%Y-%m-%d %H:%M:%S"
_NOTE = logging.Formatter("%(asctime)s  %(message)s", _DATE)
_WARNING = logging.Formatter("%(asctime)s  warning: %(message)s", _DATE)


@contextlib.contextmanager
def to_terminal(note: Callable[[str, bool], None]) -> Iterator[None]:
    """Call `note(text, is_warning)`, a display's method, for every note and warning."""
    with _attached(_TerminalHandler(note)):
        yield


@contextlib.contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append every record to `path`.

    Records logged before the file's directory exists are written with the first one after that. A
    write that fails is a warning, once: the log is not worth a run.
    """
    with _attached(_FileHandler(path)):
        yield


@contextlib.contextmanager
def to_list() -> Iterator[CollectedWarnings]:
    """Collect warnings in a process that has no display. The driver shows them."""
    handler = CollectedWarnings()
    with _attached(handler):
        yield handler


class CollectedWarnings(logging.Handler):
    """The warnings logged since the last `drain`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def drain(self) -> list[str]:
        """Return the collected warnings and forget them."""
        self.acquire()
        try:
            texts, self._texts = self._texts, []
        finally:
            self.release()
        return texts


class _TerminalHandler(logging.Handler):
    def __init__(self, note: Callable[[str, bool], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def handle(self, record: logging.LogRecord) -> bool:
        # Without the handler's lock, because displays have their own. A signal handler that logs
        # while the main thread is drawing would otherwise wait for a thread that waits for it.
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage(), record.levelno >= logging.WARNING)


class _FileHandler(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self._path = path
        self._unwritten: deque[str] = deque(maxlen=UNWRITTEN)
        self._warned = False

    def format(self, record: logging.LogRecord) -> str:
        formatter = _WARNING if record.levelno >= logging.WARNING else _NOTE
        return _escaped(bounded(formatter.format(record), LONGEST_RECORD))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._unwritten.append(self.format(record) + "\n")
            # Opened for each record: nothing is lost when the process is killed.
            with open(self._path, "ab", opener=_without_waiting) as file:
                file.write("".join(self._unwritten).encode(errors="backslashreplace"))
            self._unwritten.clear()
        except FileNotFoundError:  # the run's directory does not exist yet
            pass
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning(f"{self._path} cannot be written ({error}): the run goes on")


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A pipe without a reader is an error, and is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _escaped(text: str) -> str:
    """A record's text: every line but the first is indented, and control characters are escaped.

    A message may quote a model or a server. No line of it looks like the beginning of a record.
    """
    lines = "\n  ".join(text.splitlines())
    return "".join(
        char if char in "\n\t" or char == printable(char) else ascii(char)[1:-1] for char in lines
    )


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    """Attach `handler` to the project's loggers; restore them at the end."""
    logger = logging.getLogger(ROOT)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
