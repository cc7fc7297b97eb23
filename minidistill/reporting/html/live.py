"""A run's report while the run is going on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from minidistill.reporting.html.page import is_page
from minidistill.reporting.html.report import FILE, State, write_report
from minidistill.system.foreign import describe

logger = logging.getLogger(__name__)
INTERVAL = 10.0
"""Seconds between two writings, at least."""
SHARE = 0.01
"""Of the run's time that writing takes, at most."""


class LiveReport:
    """Writes `report.html` again and again. If that fails, the run goes on without it."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._run_dir, self._clock = run_dir, clock
        self._due = float("-inf")
        self._failed = False

    def refresh(self) -> None:
        """Write the report, unless it is too early for that."""
        began = self._clock()
        if self._failed or began < self._due:
            return
        self._write("running")
        ended = self._clock()
        self._due = ended + max(INTERVAL, (ended - began) / SHARE)

    def close(self) -> None:
        """Write it for the last time, as that of a run that has stopped, unless it has finished."""
        if not self._failed and not is_page(self._run_dir / FILE, "finished"):
            self._write("stopped")

    def _write(self, state: State) -> None:
        try:
            write_report(self._run_dir, state=state)
        except Exception as error:
            self._failed = True
            logger.warning(f"no live report: {describe(error)}", exc_info=error)
