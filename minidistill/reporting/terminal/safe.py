"""A display that may fail: the run goes on without it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from minidistill.reporting.terminal.base import Display, Header, Sample
from minidistill.system.foreign import describe
from minidistill.types import Advance, Metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SafeDisplay:
    """Passes everything on to a display until that fails. Then it is closed, and the log says why.

    What is shown is not worth a run.
    """

    def __init__(self, display: Display) -> None:
        self.display = display
        self._failed = False

    def open(self, header: Header) -> None:
        self._try(lambda: self.display.open(header))

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        shown = self._try(lambda: self.display.phase(name, total, unit))
        advance = None if shown is None else self._try(shown.__enter__)
        try:
            yield lambda count: self._try(lambda: None if advance is None else advance(count))
        finally:
            if shown is not None and advance is not None:
                self._try(lambda: shown.__exit__(None, None, None), again=True)

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._try(lambda: self.display.step(step, metrics, sample))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._try(lambda: self.display.evaluation(step, metrics))

    def baseline(self, metrics: Metrics) -> None:
        self._try(lambda: self.display.baseline(metrics))

    def checkpoint(self, step: int, path: Path) -> None:
        self._try(lambda: self.display.checkpoint(step, path))

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        self._try(lambda: self.display.scoreboard(board))

    def end(self, exit_code: int, directory: Path) -> None:
        self._try(lambda: self.display.end(exit_code, directory))

    def note(self, text: str, warning: bool = False) -> None:
        self._try(lambda: self.display.note(text, warning))

    def close(self) -> None:
        self._try(self.display.close)

    def _try(self, call: Callable[[], T], *, again: bool = False) -> T | None:
        """The call's result, None if it fails or an earlier one did. `again` calls all the same."""
        if self._failed and not again:
            return None
        try:
            return call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                with contextlib.suppress(Exception):
                    self.display.close()
                reason = describe(error)
                logger.warning(f"the display failed ({reason}): nothing is shown", exc_info=error)
            return None
