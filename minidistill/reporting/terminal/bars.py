"""The progress bars of the live display: one for the steps, one for each phase of a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from minidistill.reporting.formatting import clean, count, duration, number
from minidistill.types import Advance

LONG = 3.0
"""Seconds that a phase still takes, from which on they are shown."""
NARROW = 70
"""Cells in which a phase's rate and its remaining time do not fit together."""


class ProgressBars:
    """Rich's progress bars with the figures of a training run. Safe to call from any thread."""

    def __init__(self) -> None:
        self._name = Column(no_wrap=True, overflow="ellipsis")
        self._count = Column(no_wrap=True, overflow="ellipsis", justify="right")
        self._narrow = False
        self._progress = Progress(
            _Figure(_name, self._name),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            _Figure(_count, self._count),
            _Figure(self._rate, Column(no_wrap=True, justify="right")),
            expand=True,
            auto_refresh=False,
            get_time=time.monotonic,
        )
        self._steps = self._progress.add_task("step", total=1, unit="", rate="", style="bold")
        self._lock = threading.Lock()
        self._phases: dict[str, TaskID] = {}
        self._recent: set[str] = set()
        """Names of the phases since the last step."""

    def start(self, step: int, max_steps: int) -> None:
        self._progress.update(self._steps, completed=min(step, max_steps), total=max_steps)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar for the phase. A phase keeps its line from step to step."""
        with self._lock:
            if name not in self._phases:
                self._phases[name] = self._progress.add_task(clean(name), visible=False)
            self._recent.add(name)
            task = self._phases[name]
        self._progress.reset(
            task, total=total, visible=True, unit=clean(unit), style="dim", seconds=None
        )
        start = time.monotonic()
        try:
            yield partial(self._progress.advance, task)
        finally:
            self._progress.update(task, seconds=time.monotonic() - start)

    def end_step(self, step: int, max_steps: int, rate: float | None) -> None:
        """Advance the steps' bar. Phases that did not occur since the last step disappear."""
        self._progress.update(
            self._steps, completed=min(step, max_steps), rate=_steps_per_second(rate)
        )
        with self._lock:
            for name, task in self._phases.items():
                self._progress.update(task, visible=name in self._recent)
            self._recent.clear()

    @property
    def lines(self) -> int:
        return sum(task.visible for task in self._progress.tasks)

    def render(self, width: int) -> RenderableType:
        self._narrow = width < NARROW
        # Long names must not push the figures out of a narrow terminal.
        self._name.max_width = max(6, width // 3 - 2)
        self._count.max_width = max(12, width // 3)
        return self._progress

    def _rate(self, task: Task) -> str:
        """Units per second over the whole phase, and the time that a long one still takes.

        Rich's own rate begins at the first report: a phase that reports once, at its end, has none.
        """
        if "rate" in task.fields:
            return str(task.fields["rate"])
        ended = task.fields.get("seconds")
        seconds = ended or task.elapsed
        if not task.completed or not seconds:
            return ""
        rate = f"{number(task.completed / seconds)}/s"
        left = seconds * ((task.total or 0) / task.completed - 1)
        if ended is not None or left < LONG:
            return rate
        eta = f"eta {duration(left)}"
        return eta if self._narrow else f"{rate} {eta}"


class _Figure(ProgressColumn):
    """A column whose text is computed from the task."""

    def __init__(self, text: Callable[[Task], str], column: Column) -> None:
        super().__init__(column)
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), task.fields["style"])


def _name(task: Task) -> str:
    """A phase's name, short enough that a narrow terminal tells the evaluations apart."""
    return task.description.replace("evaluate ", "eval ", 1)


def _count(task: Task) -> str:
    figures = f"{count(int(task.completed))}/{count(int(task.total or 0))}"
    return f"{figures} {task.fields['unit']}".rstrip()


def _steps_per_second(rate: float | None) -> str:
    if not rate:
        return ""
    return f"{number(rate)} steps/s" if rate >= 0.1 else f"{duration(1 / rate)}/step"
