"""Several runs on one page: results, the settings that differ, curves, answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minidistill.errors import UserError, bounded
from minidistill.reporting.formatting import clean, duration, number
from minidistill.reporting.html.chart import Chart, Series, draw
from minidistill.reporting.html.curves import evaluation_curves, points, with_final_kl
from minidistill.reporting.html.page import ROWS, render, write_page
from minidistill.reporting.html.plots import PLOTS, step_rate
from minidistill.reporting.html.read import Run, read_run
from minidistill.reporting.html.report import ShownSample
from minidistill.reporting.html.settings import differences
from minidistill.reporting.scoreboard_rows import scoreboard_rows, side_by_side, verdict

logger = logging.getLogger(__name__)
FILE = "comparison.html"
MOST = 8
"""Runs on a page, as many as there are colors, and environments with a chart."""
NAME = 40
"""Characters of a run's name."""


def write_comparison(run_dirs: Sequence[Path], out: Path = Path(FILE)) -> Path:
    """Write a page that compares some runs, finished or not. Returns its path.

    Raises UserError (exit code 2) for a directory without a run, for one given twice, for more than
    `MOST` runs, and if `out` is a file that is no report.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise UserError("a run is given twice", fix="give each run once")
    if not 2 <= len(run_dirs) <= MOST:
        raise UserError(
            f"{len(run_dirs)} runs cannot be compared", fix=f"give 2 to {MOST} runs' directories"
        )
    runs = [read_run(path) for path in run_dirs]
    write_page(out, comparison_page(runs, labels(run_dirs)))
    for path, run in zip(run_dirs, runs, strict=True):
        for damage in run.damage:
            logger.warning(f"{path}: {damage}")
    return out


def comparison_page(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The HTML of the comparison of some runs, which are shown by these names."""
    return render(
        "comparison.html",
        title="Comparison of " + ", ".join(names),
        state="comparison",
        pause=0,
        runs=list(zip(names, runs, strict=True)),
        notes=[f"{n}: {note}" for n, run in zip(names, runs, strict=True) for note in run.damage],
        figures=_figures(runs),
        differences=differences([run.settings for run in runs]),
        charts=[chart for chart in _charts(runs, names) if chart.lines],
        samples=_samples(runs, names),
    )


def labels(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the runs' paths that differ."""
    parts = [path.resolve().parts for path in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            break
    names = [bounded(clean(name), NAME) for name in names]
    if len(set(names)) == len(names):
        return names
    return [f"{number}. {name}" for number, name in enumerate(names, 1)]


def _figures(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """The rows of the table of results: a name, and each run's value."""
    boards = [dict(scoreboard_rows(run.board)) for run in runs]
    for board in boards:
        board.pop("drift", None)  # a sentence, whose figure has a row
    names = dict.fromkeys(name for board in boards for name in board)
    columns = [_course(run) | board for run, board in zip(runs, boards, strict=True)]
    return [
        (name, tuple(column.get(name, "–") for column in columns))
        for name in ("verdict", "state", "steps", "time", *names, "tokens a second")
    ]


def _course(run: Run) -> dict[str, str]:
    rates = [rate for values in run.steps.values() if (rate := step_rate(values)) is not None]
    last = f"{run.last_step or 0}" + (f" of {run.max_steps}" if run.max_steps else "")
    return {
        "verdict": verdict(run.board) if run.board else "–",
        "state": run.state,
        "steps": last,
        "time": duration(run.board["seconds"])
        if isinstance(run.board.get("seconds"), (int, float))
        else "–",
        "tokens a second": number(sum(rates) / len(rates)) if rates else "–",
    }


def _charts(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Chart]:
    """A line for each run. Of a chart with several curves, each is a chart of its own."""
    all_steps = [with_final_kl(run.steps, run.board) for run in runs]
    by_env = [evaluation_curves(steps) for steps in all_steps]
    environments = dict.fromkeys(env for each in by_env for env in each)
    for env in list(environments)[:MOST]:
        series = [
            Series(name, _scores(each.get(env, {})), marked=True)
            for name, each in zip(names, by_env, strict=True)
        ]
        note = "The student's mean reward on fixed tasks, before training at step 0."
        yield draw(f"Evaluation: {clean(env)}", note, series, zero=True)
    for plot in PLOTS:
        for label, curve in plot.curves:
            series = [
                Series(name, points(curve, steps), marked=label in plot.marked)
                for name, steps in zip(names, all_steps, strict=True)
            ]
            title = plot.title if len(plot.curves) == 1 else f"{plot.title}: {label}"
            yield draw(title, plot.note, series, zero=plot.zero)


def _scores(curves: Mapping[str, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [*curves.get("baseline_student", []), *curves.get("student", [])]


def _samples(runs: Sequence[Run], names: Sequence[str]) -> list[ShownSample]:
    """The prompts that several runs have kept, with each run's answer after training."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for name, run in zip(names, runs, strict=True):
        for row in side_by_side({"completions": run.completions[:ROWS]}):
            by_prompt.setdefault(row.prompt, {})[name] = row
    shown = []
    for prompt, rows in by_prompt.items():
        if len(rows) < 2:
            continue
        first = next(iter(rows.values()))
        answers = [
            ("before", "before training", first.before),
            ("in context", "the teacher", first.teacher),
        ]
        answers += [(name, "after training", row.after) for name, row in rows.items()]
        shown.append(ShownSample(prompt, tuple(answers)))
    return shown
