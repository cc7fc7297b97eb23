"""The live display: a region at the bottom that is redrawn a few times a second."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from minidistill.reporting.formatting import clean, duration, evaluations, number
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.echo import Echo
from minidistill.reporting.terminal.panels import render_baseline, render_header, render_scoreboard
from minidistill.reporting.terminal.region import LiveRegion
from minidistill.types import Advance, Metrics

logger = logging.getLogger(__name__)
REFRESH_HZ = 4
"""Often enough to look alive; each redraw takes the trainer's interpreter a few milliseconds."""
SHOW_CURSOR = "\x1b[?25h"


class _Console(Console):
    """Where one thread prints at a time.

    Rich computes how many lines to erase before it writes. If another thread drew in between, lines
    of the region would be left over.
    """

    def __init__(self, stream: TextIO) -> None:
        # No emoji, no markup, no highlighting: texts come from models and files.
        super().__init__(file=stream, markup=False, emoji=False, highlight=False)
        # Reentrant: a signal handler may print while the main thread is drawing.
        self.drawing = threading.RLock()

    def __enter__(self) -> Console:
        self.drawing.acquire()
        try:
            return super().__enter__()
        except BaseException:  # an interrupt
            self.drawing.release()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.drawing.release()


class _Live(Live):
    """A failure to draw ends the drawing, not the thread that draws, and the log says so."""

    failed = False

    def __init__(self, region: LiveRegion, console: Console) -> None:
        super().__init__(region, console=console, refresh_per_second=REFRESH_HZ)
        _share_lock(self, console)

    def refresh(self) -> None:
        if self.failed:
            return
        try:
            super().refresh()
        except Exception as error:
            self.failed = True
            logger.debug("the live region cannot be drawn, and stands still", exc_info=error)


def _share_lock(live: Live, console: Console) -> None:
    """Have a region use its console's lock: two threads could wait for each other's."""
    if isinstance(console, _Console):
        live._lock = console.drawing


class LiveDisplay:
    """Draws from its own thread; the run's calls only store what is drawn next."""

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        self._stream, self._console = stream, console or _Console(stream)
        self._region = LiveRegion()
        self._live: Live | None = None
        self._echo, self._hides_cursor = Echo(stream), False
        # An exception that never reaches `close` must not leave the cursor or the echo off.
        atexit.register(self.close)

    def open(self, header: Header) -> None:
        self._console.print(render_header(header))
        self._region.open(header)
        self._live = _Live(self._region, self._console)
        self._hides_cursor = True
        self._live.start()

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        if self._live is None:
            return self._phase_before_open(name, total, unit)
        return self._region.bars.phase(name, total, unit)

    @contextmanager
    def _phase_before_open(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar of its own, which disappears at the end."""
        self._hides_cursor = True
        count = TextColumn(f"{{task.completed:.0f}}/{total} {clean(unit)}", markup=False)
        text = TextColumn("{task.description}", markup=False)
        progress = Progress(text, BarColumn(), count, console=self._console, transient=True)
        _share_lock(progress.live, self._console)
        with progress:
            yield partial(progress.advance, progress.add_task(clean(name), total=total))

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._region.end_step(step, metrics, sample)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for env, scores in evaluations(metrics).items():
            line = Text.assemble((f"evaluation at step {step}  ", "dim"), clean(env))
            for name, value in scores.items():
                line.append(f"  {clean(name)} ", "dim").append(number(value), "bold")
            if (seconds := metrics.get("time/eval", 0.0)) >= 1:
                line.append(f"  in {duration(seconds)}", "dim")
            self._console.print(line)
        if (kl := metrics.get("eval/heldout_kl")) is not None:
            line = Text.assemble((f"evaluation at step {step}  held-out KL ", "dim"))
            self._console.print(line.append(number(kl), "bold"))
        self._region.end_evaluation(step, metrics)

    def baseline(self, metrics: Metrics) -> None:
        if evaluations(metrics):
            self._console.print(render_baseline(metrics))
        self._region.end_evaluation(0, metrics)

    def checkpoint(self, step: int, path: Path) -> None:
        """The region has no room for it."""

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        # The result is the last thing on the screen, with no region below it.
        self.close()
        self._console.print(render_scoreboard(board))

    def end(self, exit_code: int, directory: Path) -> None:
        """The scoreboard has said it."""

    def note(self, text: str, warning: bool = False) -> None:
        line = Text.assemble(("warning: ", "bold yellow")) if warning else Text()
        self._console.print(line.append(clean(text)))

    def close(self) -> None:
        live, self._live = self._live, None
        try:
            if live is not None:
                live.stop()
        finally:
            self._show_cursor()
            self._echo.restore()
            atexit.unregister(self.close)

    def _show_cursor(self) -> None:
        """Rich does so too, but not if an interrupt came while it was drawing."""
        if self._hides_cursor:
            self._hides_cursor = False
            self._stream.write(SHOW_CURSOR)
            self._stream.flush()
