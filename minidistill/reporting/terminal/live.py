"""The live display: a region at the bottom that is redrawn a few times a second."""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from minidistill.reporting.formatting import clean, evaluations, number
from minidistill.reporting.terminal.base import Advance, Header, Sample
from minidistill.reporting.terminal.board import render_baseline, render_scoreboard
from minidistill.reporting.terminal.frame import Frame
from minidistill.types import Metrics

REFRESH_HZ = 4
"""Redrawing takes some milliseconds of the trainer's interpreter: enough to look alive."""


def render_header(header: Header) -> Panel:
    """What is said once at the start."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in header.rows:
        rows.add_row(Text(clean(name)), Text(clean(value)))
    title = Text(clean(header.title), "bold")
    return Panel(rows, title=title, box=box.ROUNDED, border_style="dim")


class LiveDisplay:
    """Draws from its own thread; the calls of the run only store what is to be drawn."""

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        # No emoji, no markup, no highlighting: texts come from models and files.
        self._console = console or Console(file=stream, markup=False, emoji=False, highlight=False)
        self._frame = Frame()
        self._live: Live | None = None

    def open(self, header: Header) -> None:
        self._console.print(render_header(header))
        self._frame.open(header)
        self._live = Live(self._frame, console=self._console, refresh_per_second=REFRESH_HZ)
        # An exception that nobody turns into `close` must not leave the cursor hidden.
        atexit.register(self.close)
        self._live.start()

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        phase = self._frame.begin(clean(name), total, clean(unit))
        try:
            yield phase.advance
        finally:
            phase.stop()

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._frame.step(step, metrics, sample)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for env, values in evaluations(metrics).items():
            line = Text.assemble((f"evaluation at step {step}  ", "dim"), clean(env))
            for who, value in values.items():
                line.append(f"  {clean(who)} ", "dim").append(number(value), "bold")
            self._console.print(line)
        self._frame.mark()

    def baseline(self, metrics: Metrics) -> None:
        self._console.print(render_baseline(metrics))
        self._frame.mark()

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        # The result is the last thing on the screen: nothing is redrawn below it.
        self.close()
        self._console.print(render_scoreboard(board))

    def note(self, text: str, warning: bool = False) -> None:
        line = Text.assemble(("warning: ", "bold yellow")) if warning else Text()
        self._console.print(line.append(clean(text)))

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self.close)
            live.stop()
