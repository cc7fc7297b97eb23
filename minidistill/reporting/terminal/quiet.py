"""`minidistill run --quiet`: the run's directory, warnings and the scoreboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.system.files import shown_path
from minidistill.types import Advance, Metrics


class QuietDisplay(PlainDisplay):
    """Plain lines, and few of them. Errors go to standard error, as they always do."""

    _shown: Path | None = None

    def open(self, header: Header) -> None:
        if header.directory is not None:
            self._show(header.directory)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda count: None

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        """Not shown."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Not shown."""

    def baseline(self, metrics: Metrics) -> None:
        """Not shown."""

    def note(self, text: str, warning: bool = False) -> None:
        if warning:
            super().note(text, warning)

    def end(self, exit_code: int, directory: Path) -> None:
        if self._shown is None:  # it had finished before
            self._show(directory)

    def _show(self, directory: Path) -> None:
        self._shown = directory
        self._write(f"run directory: {shown_path(directory)}")
