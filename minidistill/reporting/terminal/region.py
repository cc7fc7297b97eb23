"""What the live display redraws: progress bars, curves, metrics and a sample."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from minidistill.reporting.formatting import (
    FIGURES,
    clean,
    duration,
    number,
    sparkline,
    tokens_per_second,
)
from minidistill.reporting.terminal.bars import ProgressBars
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.pace import Pace
from minidistill.reporting.terminal.tokens import legend, sample_text
from minidistill.types import Metrics

HISTORY = 60
"""Steps in a sparkline."""
SAMPLE_LINES = 5
CURVES = (("teacher kl", "teacher_kl", "cyan"), ("reward", "reward/mean", "green"))
"""Name, metric and color of each sparkline."""


class LiveRegion:
    """The state that is drawn. The run's threads write it, the drawing thread reads it."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may print, and so draw, in the middle of an update.
        self._lock = threading.RLock()
        self.bars = ProgressBars()
        self._title, self._step, self._pace = "", 0, Pace(max_steps=1)
        self._curves: dict[str, deque[float]] = {k: deque(maxlen=HISTORY) for _, k, _ in CURVES}
        self._metrics: Metrics = {}
        self._sample: Sample | None = None

    def open(self, header: Header) -> None:
        with self._lock:
            self._title, self._step = clean(header.title), max(0, header.first_step - 1)
            self._pace = Pace(header.max_steps, eval_interval=header.eval_interval)
            self._pace.replay(header.history)
            for record in header.history:
                self._add_to_curves(record)
            self.bars.start(self._step, header.max_steps)

    def end_step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        with self._lock:
            self._pace.end_step()
            self.bars.end_step(step, self._pace.max_steps, self._pace.steps_per_second)
            self._step, self._metrics = step, dict(metrics)
            self._sample = sample or self._sample
            self._add_to_curves(metrics)

    def _add_to_curves(self, metrics: Mapping[str, Any]) -> None:
        for key, curve in self._curves.items():
            if key in metrics:  # a record has null for what was not finite
                curve.append(math.nan if metrics[key] is None else metrics[key])

    def end_evaluation(self, step: int, metrics: Metrics) -> None:
        with self._lock:
            self._pace.evaluated(step, metrics.get("time/eval"))
            self._pace.start_step()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 4
        with self._lock:
            parts: list[RenderableType] = [self.bars.render(width)]
            if curves := [row for row in CURVES if self._curves[row[1]]]:
                parts.append(self._sparklines(curves, width))
            if figures := self._figures():
                parts.append(_grid(figures, width))
            # A short terminal shows the figures and leaves out the sample.
            lines = min(SAMPLE_LINES, console.size.height - 14 - self.bars.lines)
            if self._sample and lines > 0:
                parts += _sample(self._sample, width, lines)
            title = Text(self._title, "bold")
        yield Panel(Group(*parts), title=title, box=box.ROUNDED, border_style="dim")

    def _sparklines(self, curves: list[tuple[str, str, str]], width: int) -> Table:
        grid = Table.grid(padding=(0, 1))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        values_shown = max(8, min(HISTORY, width - 28))
        for name, key, style in curves:
            values = list(self._curves[key])[-values_shown:]
            first, last = Text(number(values[0]), "dim"), Text(number(values[-1]), "bold")
            grid.add_row(Text(name, "dim"), first, Text(sparkline(values), style), last)
        return grid

    def _figures(self) -> list[tuple[str, str]]:
        values = {name: self._metrics.get(key) for name, key in FIGURES}
        values["tokens/s"] = tokens_per_second(self._metrics)
        figures = [(name, number(value)) for name, value in values.items() if value is not None]
        if (seconds := self._pace.countdown(self._step)) is not None:
            figures.append(("eta", duration(seconds)))
        return figures


def _grid(figures: list[tuple[str, str]], width: int) -> Table:
    """Name and value pairs in as many columns as fit."""
    columns = max(1, min(len(figures), width // 22))
    grid = Table.grid(padding=(0, 2))
    for start in range(0, len(figures), columns):
        row = figures[start : start + columns]
        grid.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in row))
    return grid


def _sample(sample: Sample, width: int, lines: int) -> list[RenderableType]:
    title = Text("sample", "bold", no_wrap=True, overflow="ellipsis")
    if sample.reward is not None:
        title.append(f"  reward {number(sample.reward)}", "dim")
    title.append(f"  {clean(sample.env)}", "dim")
    return [Text(), title, sample_text(sample, width * lines), legend()]
