"""What the live region draws: progress, curves, figures and a sample."""

from __future__ import annotations

import threading
import time
from collections import deque

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minidistill.reporting.formatting import (
    COLUMNS,
    Pace,
    clean,
    count,
    duration,
    number,
    sparkline,
    tokens_per_second,
)
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.tokens import legend, sample_text
from minidistill.types import Metrics

HISTORY = 60
"""Steps in a sparkline."""
SAMPLE_LINES = 5
CURVES = (("teacher kl", "teacher_kl", "cyan"), ("reward", "reward/mean", "green"))


class Phase:
    """One part of the current step and how fast it goes."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.current = 0, True
        self._began, self._ended = time.monotonic(), 0.0

    def advance(self, count: int) -> None:
        self.done += count

    def stop(self) -> None:
        self._ended = time.monotonic()

    @property
    def rate(self) -> str:
        seconds = (self._ended or time.monotonic()) - self._began
        return f"{number(self.done / seconds)}/s" if self.done and seconds > 0 else ""


class Frame:
    """The state of the region. The run writes, the drawing thread reads, a lock in between."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may print, and so draw, in the middle of an update.
        self._lock = threading.RLock()
        self._pace = Pace(max_steps=1)
        self._title, self._step = "", 0
        self._phases: dict[str, Phase] = {}
        self._curves: dict[str, deque[float]] = {k: deque(maxlen=HISTORY) for _, k, _ in CURVES}
        self._metrics: Metrics = {}
        self._sample: Sample | None = None

    def open(self, header: Header) -> None:
        with self._lock:
            self._pace = Pace(header.max_steps)
            self._title, self._step = clean(header.title), max(0, header.first_step - 1)

    def begin(self, name: str, total: int, unit: str) -> Phase:
        phase = Phase(name, total, unit)
        with self._lock:
            self._phases[name] = phase
        return phase

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        with self._lock:
            self._pace.step()
            self._step, self._metrics = step, dict(metrics)
            self._sample = sample or self._sample
            for key, curve in self._curves.items():
                if key in metrics:
                    curve.append(metrics[key])
            # Lines stay where they are from step to step; those of the step before last go.
            self._phases = {name: p for name, p in self._phases.items() if p.current}
            for phase in self._phases.values():
                phase.current = False

    def mark(self) -> None:
        with self._lock:
            self._pace.mark()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 4
        with self._lock:
            parts: list[RenderableType] = [self._progress(width)]
            if curves := [row for row in CURVES if self._curves[row[1]]]:
                parts.append(self._sparklines(curves, width))
            if cells := self._cells():
                parts.append(_grid(cells, width))
            # A short terminal shows the figures and leaves the sample out.
            lines = min(SAMPLE_LINES, console.size.height - 15 - len(self._phases))
            if self._sample and lines > 0:
                parts += _sample(self._sample, width, lines)
        title = Text(self._title, "bold")
        yield Panel(Group(*parts), title=title, box=box.ROUNDED, border_style="dim")

    def _progress(self, width: int) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        rate, total = self._pace.rate, self._pace.max_steps
        pace = f"{number(rate)} steps/s" if rate and rate >= 0.1 else ""
        if rate and not pace:
            pace = f"{duration(1 / rate)}/step"
        grid.add_row(
            Text("step", "bold"),
            ProgressBar(total=max(1, total), completed=min(self._step, total)),
            Text(f"{self._step}/{total}", "bold"),
            Text(pace),
        )
        for phase in self._phases.values():
            # A long name must not push the figures out of a narrow terminal.
            name, unit = Text(phase.name, "dim"), Text(phase.unit)
            name.truncate(max(6, width // 4), overflow="ellipsis")
            unit.truncate(max(4, width // 6), overflow="ellipsis")
            grid.add_row(
                name,
                ProgressBar(total=max(1, phase.total), completed=min(phase.done, phase.total)),
                Text(f"{count(phase.done)}/{count(phase.total)} {unit.plain}", "dim"),
                Text(phase.rate, "dim"),
            )
        return grid

    def _sparklines(self, curves: list[tuple[str, str, str]], width: int) -> Table:
        grid = Table.grid(padding=(0, 1))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        room = max(8, min(HISTORY, width - 28))
        for name, key, style in curves:
            values = list(self._curves[key])[-room:]
            first, last = Text(number(values[0]), "dim"), Text(number(values[-1]), "bold")
            grid.add_row(Text(name, "dim"), first, Text(sparkline(values), style), last)
        return grid

    def _cells(self) -> list[tuple[str, str]]:
        values = {name: self._metrics.get(key) for name, key in COLUMNS}
        values["tokens/s"] = tokens_per_second(self._metrics)
        cells = [(name, number(value)) for name, value in values.items() if value is not None]
        if self._pace.rate:
            cells.append(("eta", duration(self._pace.eta(self._step))))
        return cells


def _grid(cells: list[tuple[str, str]], width: int) -> Table:
    """Name and value pairs in as many columns as fit."""
    columns = max(1, min(len(cells), width // 22))
    grid = Table.grid(padding=(0, 2))
    for start in range(0, len(cells), columns):
        row = [
            Text.assemble((f"{name} ", "dim"), value)
            for name, value in cells[start : start + columns]
        ]
        grid.add_row(*row)
    return grid


def _sample(sample: Sample, width: int, lines: int) -> list[RenderableType]:
    head = Text("sample", "bold", no_wrap=True, overflow="ellipsis")
    if sample.reward is not None:
        head.append(f"  reward {number(sample.reward)}", "dim")
    head.append(f"  {clean(sample.env)}", "dim")
    return [Text(), head, sample_text(sample, width * lines), legend()]
