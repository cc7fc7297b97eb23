"""A run's report while the run is going on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from minidistill.errors import UserError
from minidistill.reporting.html.read import Unfinished
from minidistill.reporting.html.report import PAUSE, has_report, write_report
from minidistill.system.foreign import describe

logger = logging.getLogger(__name__)
SHARE = 0.01
"""Of the run's time that writing takes, at most."""


class LiveReport:
    """Writes `report.html` again and again. If that fails, the run goes on without it."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._run_dir, self._clock = run_dir, clock
        self._due: float | None = None
        self._pause = PAUSE
        self._failed = False

    def refresh(self) -> None:
        """Write the report, unless it is too early for that."""
        began = self._clock()
        if self._failed or (self._due is not None and began < self._due):
            return
        self._write("running")
        ended = self._clock()
        self._pause = max(PAUSE, (ended - began) / SHARE)
        self._due = ended + self._pause

    def close(self) -> None:
        """Write it for the last time: unless the run has finished, it has stopped."""
        if self._due is not None and not self._failed and not has_report(self._run_dir):
            self._write("stopped")

    def _write(self, state: Unfinished) -> None:
        try:
            write_report(self._run_dir, unfinished=state, pause=self._pause)
        except Exception as error:
            self._failed = True
            reason = error.what if isinstance(error, UserError) else describe(error)
            logger.warning(f"no live report: {reason}", exc_info=error)
