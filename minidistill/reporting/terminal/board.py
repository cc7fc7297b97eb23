"""The scoreboard and the baseline table, for a terminal that has colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minidistill.reporting.formatting import clean, evaluations, number, percent, signed
from minidistill.reporting.terminal.rows import effort, env_rows, scoreboard_rows, share

WIDTH = 76
"""Wider panels only spread the figures apart."""


def render_scoreboard(board: Mapping[str, Any]) -> RenderableType:
    """A panel: how much of the gap was closed, then what stands behind it."""
    parts: list[RenderableType] = []
    if (closed := share(board)) is not None:
        parts += [_bar(board, closed), Text()]
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(overflow="fold")
    for name, value in scoreboard_rows(board):
        figures.add_row(Text(name), Text(value, "bold" if name == "gap closed" else ""))
    parts.append(figures)
    if rows := env_rows(board):
        parts += [Text(), _table(("environment", "before", "after", "teacher", "gap"), rows)]
    env = clean(board.get("env") or "")
    return Panel(
        Group(*parts),
        title=Text(f"scoreboard · {env}" if env else "scoreboard", "bold"),
        subtitle=Text(effort(board), "dim"),
        box=box.ROUNDED,
        padding=(1, 2),
        border_style="green" if closed is not None and closed >= 0.5 else "yellow",
        width=WIDTH,
    )


def render_baseline(metrics: Mapping[str, Any]) -> RenderableType:
    """What student and teacher can do before training."""
    rows = [
        (
            clean(env),
            number(values.get("baseline_student")),
            number(values.get("baseline_teacher")),
            signed(values.get("baseline_diff")),
        )
        for env, values in evaluations(metrics).items()
    ]
    return _table(("baseline", "student", "teacher", "difference"), rows)


def _bar(board: Mapping[str, Any], closed: float) -> Table:
    """From the student before to the teacher, filled as far as the student got."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
        Text(number(board.get("baseline_student")), "dim"),
        ProgressBar(total=1.0, completed=closed, complete_style="green", finished_style="green"),
        Text(f"{number(board.get('baseline_teacher'))}  {percent(board.get('gap_closed'))}"),
    )
    return bar


def _table(names: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(Text(name), justify="right" if place else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
