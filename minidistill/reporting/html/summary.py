"""A run in a few lines of HTML, for notebooks: the verdict, the scoreboard, small curves."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from minidistill.errors import bounded
from minidistill.reporting.formatting import clean, number
from minidistill.reporting.html.chart import Points, thin
from minidistill.reporting.html.read import Run, read_run
from minidistill.reporting.scoreboard_rows import effort, scoreboard_rows, verdict

WIDTH, HEIGHT, EDGE = 132, 34, 3
MAX_POINTS = 100
"""Points of a small curve."""
LONGEST = 300
"""Characters of a text from the run's files."""

CURVES = (
    ("teacher KL", "teacher_kl"),
    ("reward", "reward/mean"),
    ("entropy", "entropy/student"),
    ("length", "completions/length_mean"),
)
SOFT = "opacity:.7"


def summary_html(directory: Path | str) -> str:
    """A fragment for a page of any color: its styles are inline, it has no script and no ids.

    The run may be going on, or have stopped anywhere. Raises UserError (exit code 2) if `directory`
    holds no run.
    """
    run = read_run(Path(directory))
    parts = [f'<div style="font-weight:600;overflow-wrap:anywhere">{_text(run.name)}</div>']
    if run.board:
        parts.append(
            f'<div style="font-size:1.15em;margin:.3em 0">{_text(verdict(run.board))}</div>'
        )
    elif run.steps:
        parts.append(f'<div style="margin:.3em 0">Step {max(run.steps)}; no scoreboard yet.</div>')
    parts += [f'<div style="{SOFT}">{_text(note)}</div>' for note in run.damage]
    curves = [curve for name, key in CURVES if (curve := _curve(name, _points(run, key)))]
    if curves:
        row = "display:flex;flex-wrap:wrap;gap:.6em 1.6em;margin:.6em 0"
        parts.append(f'<div style="{row}">{"".join(curves)}</div>')
    if rows := scoreboard_rows(run.board):
        cell = "padding:.1em 1.2em .1em 0;text-align:left;vertical-align:top;background:none"
        head = f"{cell};min-width:7em;font-weight:400;{SOFT}"
        body = "".join(
            f'<tr style="background:none"><th scope="row" style="{head}">{_text(name)}</th>'
            f'<td style="{cell}">{_text(value)}</td></tr>'
            for name, value in rows
        )
        parts.append(f'<table style="border-collapse:collapse;border:0">{body}</table>')
    if text := effort(run.board):
        parts.append(f'<div style="{SOFT};margin-top:.4em">{_text(text)}</div>')
    style = "max-width:60em;overflow-wrap:anywhere;font-variant-numeric:tabular-nums"
    return f'<div style="{style}">{"".join(parts)}</div>'


def _text(value: Any) -> str:
    return html.escape(bounded(clean(value), LONGEST))


def _points(run: Run, key: str) -> Points:
    values = ((step, metrics.get(key, math.nan)) for step, metrics in run.steps.items())
    return [(step, value) for step, value in values if math.isfinite(value)]


def _curve(name: str, points: Points) -> str:
    """A line in the text's own color, with its first and last value; empty for under two points."""
    if len(points) < 2:
        return ""
    points = thin(points, MAX_POINTS)
    first, last = points[0][0], points[-1][0]
    low, high = min(value for _, value in points), max(value for _, value in points)
    height = (high - low) or 1.0
    path = "L".join(
        f"{EDGE + (step - first) / (last - first) * (WIDTH - 2 * EDGE):.1f} "
        f"{HEIGHT - EDGE - (value - low) / height * (HEIGHT - 2 * EDGE):.1f}"
        for step, value in points
    )
    label = f"{name}: {number(points[0][1])} → {number(points[-1][1])}"
    return (
        f'<div><svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}" style="display:block"><path d="M{path}" fill="none" '
        f'stroke="currentColor" stroke-width="1.6" stroke-linejoin="round"/></svg>'
        f'<div style="font-size:.85em">{label}</div></div>'
    )
