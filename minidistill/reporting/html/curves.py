"""The charts of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.reporting.formatting import clean, evaluations, number
from minidistill.reporting.html.chart import Chart, Points, Series, draw, draw_over
from minidistill.reporting.html.plots import GROUPS, LEARNING, Curve, Plot, Values

Steps = dict[int, dict[str, float]]

MOST = 8
"""Lines of a chart, and charts of evaluations: colors that the eye tells apart."""
PROFILES = 3
"""Times of a run at which the KL by position is shown."""

_POSITIONS = re.compile(r"kl/by_position/((\d{1,9})(?:-\d{0,9})?)")
_GROUP = re.compile(r"(env|context)/(.+)/teacher_kl")


@dataclass(frozen=True, slots=True)
class Group:
    """Charts that belong together."""

    title: str
    charts: tuple[Chart, ...]


def groups(steps: Steps, board: Mapping[str, Any]) -> list[Group]:
    """The charts that have data, by group; evaluations first."""
    steps = with_final_kl(steps, board)
    drawn = []
    for title, plots in GROUPS:
        charts = [_plotted(plot, steps) for plot in plots]
        if plots is LEARNING:
            charts = [*_evaluations(steps), *charts, _by_position(steps), *_by_group(steps)]
        if charts := [chart for chart in charts if chart.lines]:
            drawn.append(Group(title, tuple(charts)))
    return drawn


def points(curve: Curve, steps: Steps) -> Points:
    """A curve's values by step."""
    compute = curve if callable(curve) else lambda values: values.get(curve)
    values = ((step, compute(metrics)) for step, metrics in steps.items())
    return [(step, value) for step, value in values if value is not None]


def _plotted(plot: Plot, steps: Steps) -> Chart:
    series = [
        Series(name, points(curve, steps), marked=name in plot.marked)
        for name, curve in plot.curves
    ]
    return draw(plot.title, plot.note, series, zero=plot.zero)


def with_final_kl(steps: Steps, board: Mapping[str, Any]) -> Steps:
    """The steps with the held-out KL after training, which the scoreboard has.

    It is of the last step's weights, or of those that the run has chosen.
    """
    key, best = "eval/heldout_kl", board.get("best_step")
    step = best if isinstance(best, int) and best in steps else max(steps, default=0)
    after = board.get("heldout_kl_after")
    if step and isinstance(after, float) and key not in steps[step]:
        return steps | {step: steps[step] | {key: after}}
    return steps


def evaluation_curves(steps: Steps) -> dict[str, dict[str, Points]]:
    """The scores of evaluations, as {environment: {name: points}}."""
    by_env: dict[str, dict[str, Points]] = {}
    for step, metrics in steps.items():
        for env, values in evaluations(metrics).items():
            for name, value in values.items():
                by_env.setdefault(env, {}).setdefault(name, []).append((step, value))
    return by_env


def _evaluations(steps: Steps) -> Iterator[Chart]:
    """One chart per environment: the student's points between the two baselines."""
    last = max(steps, default=0)
    for env, curves in list(evaluation_curves(steps).items())[:MOST]:
        series = []
        for name, values in list(curves.items())[:MOST]:
            if name == "baseline_diff":
                continue
            if name.startswith("baseline_"):
                # A baseline is measured once. Drawn as a line, it compares with every point.
                value = values[-1][1]
                series.append(Series(name, [(0, value), (max(1, last), value)], flat=True))
            else:
                # before training it is the baseline
                start = curves.get("baseline_student", []) if name == "student" else []
                series.append(Series(name, [*start[:1], *values], marked=True))
        # the student first: it has the first color
        series.sort(key=lambda s: s.flat)
        note = (
            "Mean reward on fixed tasks. The dashed lines show student and teacher before "
            "training; the student should climb from the lower to the upper one."
        )
        yield draw(f"Evaluation: {clean(env)}", note, series, zero=True)


def _by_position(steps: Steps) -> Chart:
    """The KL by position in the completion, at the beginning, the middle and the end of the run."""
    first: dict[str, int] = {}
    with_kl: dict[int, dict[str, float]] = {}
    for step, values in steps.items():
        for key, value in values.items():
            if match := _POSITIONS.fullmatch(key):
                first[match[1]] = int(match[2])
                with_kl.setdefault(step, {})[match[1]] = value
    names = sorted(first, key=lambda name: first[name])
    series = [
        Series(_span(part), _mean_by_name(names, [with_kl[step] for step in part]), marked=True)
        for part in _parts(list(with_kl))
    ]
    return draw_over(
        "KL by position",
        "Mean KL(student‖teacher) by the position of the token in the completion, in nats. Where "
        "it stays high, the student has not learned what the context says.",
        "position, from",
        [(number(first[name]), _positions(name)) for name in names],
        series,
    )


def _positions(name: str) -> str:
    return f"{name[:-1]} and more" if name.endswith("-") else name.replace("-", " to ")


def _parts(steps: Sequence[int]) -> list[Sequence[int]]:
    """The first, the middle and the last tenth of some steps, none twice."""
    size = max(1, len(steps) // 10)
    if len(steps) < PROFILES:
        return [[step] for step in steps]
    middle = (len(steps) - size) // 2
    return [steps[:size], steps[middle : middle + size], steps[-size:]]


def _span(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _mean_by_name(names: Sequence[str], rows: Sequence[Values]) -> Points:
    means = []
    for i, name in enumerate(names):
        values = [row[name] for row in rows if name in row]
        if values:
            means.append((i, sum(values) / len(values)))
    return means


def _by_group(steps: Steps) -> Iterator[Chart]:
    """The KL of each environment and of each context, if there are several."""
    keys: dict[str, dict[str, str]] = {"env": {}, "context": {}}
    for values in steps.values():
        for key in values:
            if match := _GROUP.fullmatch(key):
                keys[match[1]][match[2]] = key
    for kind, title in (("env", "environment"), ("context", "context")):
        names = list(keys[kind].items())[:MOST]
        series = [Series(clean(name), points(key, steps)) for name, key in names]
        left_out = len(keys[kind]) - len(names)
        more = f" {left_out} more are in metrics.jsonl." if left_out else ""
        note = f"In nats per token, on the rollouts of each {title}.{more}"
        yield draw(f"Teacher KL by {title}", note, series, zero=True)
