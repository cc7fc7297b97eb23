"""The header, the baseline and the scoreboard, for a terminal with colors."""

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
from minidistill.reporting.scoreboard_rows import effort, env_rows, gap_share, scoreboard_rows
from minidistill.reporting.terminal.base import Header

WIDTH = 76
"""Of the scoreboard: a wider panel only spreads the figures apart."""


def render_header(header: Header) -> Panel:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in header.rows:
        rows.add_row(Text(clean(name)), Text(clean(value)))
    title = Text(clean(header.title), "bold")
    return Panel(rows, title=title, box=box.ROUNDED, border_style="dim")


def render_baseline(metrics: Mapping[str, Any]) -> RenderableType:
    """What student and teacher can do before training."""
    rows = [
        (
            clean(env),
            number(scores.get("baseline_student")),
            number(scores.get("baseline_teacher")),
            signed(scores.get("baseline_diff")),
        )
        for env, scores in evaluations(metrics).items()
    ]
    return _table(("baseline", "student", "teacher", "difference"), rows)


def render_scoreboard(board: Mapping[str, Any]) -> RenderableType:
    """How much of the gap was closed, and the figures behind it."""
    parts: list[RenderableType] = []
    if (closed := gap_share(board)) is not None:
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


def _bar(board: Mapping[str, Any], closed: float) -> Table:
    """A bar from the student's score before training to the teacher's."""
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
    for column, name in enumerate(names):
        table.add_column(Text(name), justify="right" if column else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
