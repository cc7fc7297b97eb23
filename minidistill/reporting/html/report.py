"""A run's report."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from minidistill.reporting.formatting import duration, number
from minidistill.reporting.html.curves import groups
from minidistill.reporting.html.page import ROWS, is_page, render, write_page
from minidistill.reporting.html.read import Run, Unfinished, read_run
from minidistill.reporting.scoreboard_rows import (
    bar,
    effort,
    env_rows,
    scoreboard_rows,
    side_by_side,
)
from minidistill.system.files import write_atomic

logger = logging.getLogger(__name__)
FILE = "report.html"
TILE = 24
"""Characters of a figure that is shown large; longer ones are lines of a list."""
PACE_STEPS = 20
"""Steps whose mean time says when the run will end."""
PAUSE = 10.0
"""Seconds after which the page of a running one is loaded again, at least."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that is shown large, with a remark below it."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A held-out prompt, and its answers by their names. `remark` compares the last with them."""

    prompt: str
    answers: tuple[tuple[str, str, str], ...]
    """(name, what it is, text)"""
    remark: str = ""


def write_report(
    run_dir: Path,
    out: Path | None = None,
    *,
    unfinished: Unfinished | None = None,
    pause: float = 0.0,
) -> Path:
    """Write a run's report to `out`, or `report.html` in its directory. Returns the path.

    The run may be in progress or have stopped at any point: the page leaves out files that are
    missing or damaged and says so; a warning names damaged ones. `unfinished` is the state of a run
    without a whole scoreboard; without it the run's lock says whether it is running. The page of a
    running one is loaded again after `pause` seconds or more. Raises UserError (exit code 2) if
    `run_dir` holds no run, or if `out` is a file that is no report.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, unfinished)
    page = report_page(run, pause)
    if out is None:
        write_atomic(run_dir / FILE, page)
    else:
        write_page(out, page)
    if unfinished is None:  # the run itself would say it again and again
        for damage in run.damage:
            logger.warning(f"{run_dir}: {damage}")
    return out or run_dir / FILE


def has_report(run_dir: Path) -> bool:
    """Whether the report of the finished run is there."""
    return is_page(run_dir / FILE, "finished")


def report_page(run: Run, pause: float = 0.0) -> str:
    """The report's HTML. That of a running one loads itself again after `pause` seconds."""
    rows, shown = scoreboard_rows(run.board), samples(run)
    tiles = [_tile(name, value) for name, value in rows if _is_short(value)]
    return render(
        "report.html",
        run=run,
        title=run.name,
        state=run.state,
        pause=round(max(pause, PAUSE, _step_seconds(run) or 0.0)),
        status=_status(run),
        progress=min(1.0, (run.last_step or 0) / run.max_steps) if run.max_steps else None,
        bar=bar(run.board),
        tiles=tiles[:ROWS] if run.board else _so_far(run),
        sentences=[row for row in rows if not _is_short(row[1])][:ROWS],
        effort=effort(run.board),
        env_rows=env_rows(run.board)[:ROWS],
        samples=shown,
        said=_said(shown),
        chart_groups=groups(run.steps, run.board),
    )


def _is_short(value: str) -> bool:
    return len(value.partition("  (")[0]) <= TILE


def _tile(name: str, value: str) -> Tile:
    figure, _, remark = value.partition("  (")
    return Tile(name, figure, remark.rstrip(")"))


def _status(run: Run) -> str:
    """Where the run is, in words."""
    step, steps = run.last_step or 0, run.max_steps
    if run.state == "finished":
        return f"up to step {step}"
    place = f"step {step} of {steps}" if steps else f"up to step {step}"
    if run.state == "stopped":
        return place
    if steps is not None and step >= steps:
        return f"{place} · the last evaluation"
    seconds = _step_seconds(run)
    left = "" if seconds is None or steps is None else duration(seconds * (steps - step))
    return place + (f" · about {left} of steps left" if left else "")


def _step_seconds(run: Run) -> float | None:
    """The mean time of the last steps, None before the first."""
    times = [v["time/step"] for v in run.steps.values() if "time/step" in v][-PACE_STEPS:]
    times = [time for time in times if 0 <= time < math.inf]
    return sum(times) / len(times) if times else None


def _so_far(run: Run) -> list[Tile]:
    """The figures of a run without a scoreboard: first and latest values."""
    tiles = []
    for name, key in (
        ("teacher KL", "teacher_kl"),
        ("teacher KL, held out", "eval/heldout_kl"),
        ("reward", "reward/mean"),
        ("entropy", "entropy/student"),
        ("length, tokens", "completions/length_mean"),
    ):
        values = [v[key] for v in run.steps.values() if math.isfinite(v.get(key, math.nan))]
        if values:
            latest = f" → {number(values[-1])}" if len(values) > 1 else ""
            tiles.append(Tile(name, f"{number(values[0])}{latest}"))
    return tiles


def samples(run: Run) -> list[ShownSample]:
    """The held-out prompts that were kept, with the answers that are there so far."""
    shown = []
    for row in side_by_side({"completions": run.completions[:ROWS]}):
        answers = [
            ("before", "the student before training", row.before),
            ("in context", "the teacher, which reads the context", row.teacher),
        ]
        if run.board:
            answers.append(("after", "the trained student, without the context", row.after))
        shown.append(
            ShownSample(row.prompt, tuple(answers), _remark(row.before, row.teacher, row.after))
        )
    return shown


def _remark(before: str, teacher: str, after: str) -> str:
    if after in ("–", ""):
        return ""
    if after == teacher:
        return "as before, and as in context" if after == before else "as in context"
    return "as before" if after == before else ""


def _said(shown: list[ShownSample]) -> str:
    """How many answers after training are those of the teacher, or those from before."""
    remarks = [sample.remark for sample in shown]
    parts = [
        f"{count} {'is' if count == 1 else 'are'} {word}"
        for word in ("as in context", "as before")
        if (count := sum(word in remark for remark in remarks))
    ]
    return (
        f"Of {len(shown)} answers after training, {' and '.join(parts)}, word for word."
        if parts
        else ""
    )
