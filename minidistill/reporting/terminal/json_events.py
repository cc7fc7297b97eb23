"""`minidistill run --json`: what happens, as one JSON object a line. docs/terminal.md has them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from minidistill.errors import UserError, UserErrors
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.output import Output
from minidistill.types import Advance, Metrics

_PATHS = {
    "adapter": "adapter",
    "model": "model",
    "metrics": "metrics.jsonl",
    "scoreboard": "scoreboard.json",
    "report": "report.html",
    "log": "logs/run.log",
}
"""What `end` names of a run's directory, if it is there."""


class JsonDisplay:
    """Writes an event for each call, and flushes it. Numbers that are not finite become null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = cast(TextIO, Output(stream))
        self._lock = threading.RLock()
        self._board: Mapping[str, Any] = {}

    def open(self, header: Header) -> None:
        self._write(
            "start",
            directory=None if header.directory is None else str(header.directory),
            first_step=header.first_step,
            max_steps=header.max_steps,
            settings=_settings(header.rows),
        )

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda count: None

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._write("step", step=step, metrics=metrics)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._write("evaluation", step=step, metrics=metrics)

    def baseline(self, metrics: Metrics) -> None:
        self._write("evaluation", step=0, metrics=metrics)

    def checkpoint(self, step: int, path: Path) -> None:
        self._write("checkpoint", step=step, path=str(path))

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        self._board = board

    def note(self, text: str, warning: bool = False) -> None:
        self._write("warning" if warning else "note", text=text)

    def end(self, exit_code: int, directory: Path) -> None:
        names = {"directory": ""} | _PATHS
        paths = {key: directory / name for key, name in names.items()}
        self._write(
            "end",
            exit_code=exit_code,
            verdict=self._board.get("verdict"),
            outcome=self._board.get("outcome"),
            scoreboard=self._board or None,
            paths={key: str(path) for key, path in paths.items() if path.exists()},
        )

    def error(self, error: UserError) -> None:
        """The last event of a run that failed."""
        problems = [{"what": p.what, "where": p.where, "fix": p.fix} for p in error.problems]
        hidden = error.hidden if isinstance(error, UserErrors) else 0
        first = problems[0]
        self._write(
            "error", exit_code=error.exit_code, **first, problems=problems, more_problems=hidden
        )

    def close(self) -> None:
        """There is nothing to release."""

    def _write(self, event: str, **fields: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        # ASCII, so that every encoding has it, and U+2028 begins no line
        line = json.dumps(_plain({"event": event, "time": time, **fields}), allow_nan=False)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def _settings(rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The header's rows by name. One without a name goes on with the row before."""
    settings: dict[str, str] = {}
    for name, value in rows:
        if not name and settings:
            name, before = settings.popitem()
            value = f"{before}; {value}"
        settings[name] = value
    return settings


def _plain(value: Any) -> Any:
    """What JSON can say of a value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def events_alone() -> Iterator[TextIO]:
    """Standard output for events. All else that is written to it goes to standard error.

    So does what libraries in C and subprocesses write, where this is the process's own output.
    """
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if _is_own(stream, 1) and _is_own(sys.stderr, 2):
            kept = os.dup(1)
            stream = stack.enter_context(open(kept, "w", encoding="utf-8"))  # not inherited
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stream


def _is_own(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False
