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

from minidistill.reporting.formatting import clean, evaluations, number, signed
from minidistill.reporting.scoreboard_rows import (
    Bar,
    SideBySide,
    bar,
    effort,
    env_rows,
    scoreboard_rows,
    shown_completions,
    verdict,
)
from minidistill.reporting.terminal.base import Header

WIDTH = 76
"""Of the scoreboard: a wider panel only spreads the figures apart."""
CHARACTERS = 120
"""Of a prompt or completion on the scoreboard."""
COLORS = {"closed": "green", "worse": "red", "context_harms": "red"}
"""Of the scoreboard's border, by outcome; yellow otherwise. The verdict says it in words."""


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
    """The verdict, and the figures behind it."""
    parts: list[RenderableType] = [Text(verdict(board), "bold"), Text()]
    if (closed := bar(board)) is not None:
        parts += [_bar(closed), Text()]
    figures = Table.grid(padding=(0, 1))  # 60 columns have room for an interval
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(overflow="fold")
    for name, value in scoreboard_rows(board):
        figures.add_row(Text(name), Text(value))
    parts.append(figures)
    if rows := env_rows(board):
        parts += [Text(), _table(("environment", "before", "after", "teacher", "gap"), rows)]
    parts.append(Text())
    for shown in shown_completions(board, CHARACTERS):
        parts += [Text.assemble(("held-out prompt  ", "dim"), shown.prompt), _completions(shown)]
    env = clean(board.get("env") or "")
    return Panel(
        Group(*parts),
        title=Text(f"scoreboard · {env}" if env else "scoreboard", "bold"),
        subtitle=Text(effort(board), "dim"),
        box=box.ROUNDED,
        padding=(1, 1, 0, 1),
        border_style=COLORS.get(str(board.get("outcome")), "yellow"),
        width=WIDTH,
    )


def _bar(closed: Bar) -> Table:
    """A bar from the student's figure before training to the teacher's."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    table.add_row(
        Text(closed.start, "dim"),
        ProgressBar(
            total=1.0, completed=closed.share, complete_style="green", finished_style="green"
        ),
        Text(f"{closed.end}  {closed.text}"),
    )
    return table


def _completions(shown: SideBySide) -> Table:
    """A prompt's completions in three columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in ("before", "teacher", "after"):
        table.add_column(Text(name, "dim"), ratio=1, overflow="fold")
    table.add_row(Text(shown.before), Text(shown.teacher), Text(shown.after))
    return table


def _table(names: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(names):
        table.add_column(Text(name), justify="right" if column else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
