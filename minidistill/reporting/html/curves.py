"""The charts of the page, with a note on how to read each."""

from __future__ import annotations

from collections.abc import Iterator

from minidistill.reporting.formatting import evaluations
from minidistill.reporting.html.chart import Chart, Series, draw

Steps = dict[int, dict[str, float]]

CHARTS = (
    (
        "Teacher KL",
        ("teacher_kl",),
        "KL(student‖teacher) on the student's completions, in nats per token. Lower is more "
        "similar; at 0 the student behaves as if it had read the context.",
    ),
    (
        "Reward",
        ("reward/mean",),
        "Mean reward of the training rollouts. The tasks change from step to step, so single steps "
        "are noisy; the evaluations above use fixed tasks.",
    ),
    (
        "Loss",
        ("loss/policy", "loss/kl"),
        "The reward term and the distillation term. The reward term stays near 0 by design: judge "
        "a run by its reward and KL, not by its loss.",
    ),
    (
        "Entropy",
        ("entropy/student", "entropy/teacher"),
        "In nats per token. The two curves should converge. If the student's entropy falls to 0 "
        "and the teacher's does not, the student has collapsed.",
    ),
    (
        "Completion length",
        ("completions/length_mean",),
        "Mean length in tokens. A steady climb to the limit often means that the student no longer "
        "learns when to stop.",
    ),
    (
        "Sampler mismatch",
        ("kl/sampler_mismatch",),
        "How far the sampler's probabilities are from the trainer's (mean of ρ - log ρ - 1). It is "
        "near 0 if both compute the same; growth means stale weights or different numerics.",
    ),
)


def charts(steps: Steps) -> list[Chart]:
    """The charts that have data, evaluations first."""
    drawn = list(_evaluation_charts(steps))
    for title, keys, note in CHARTS:
        series = [Series(key, points) for key in keys if (points := _points(steps, key))]
        if series:
            drawn.append(draw(title, note, series))
    return [chart for chart in drawn if chart.lines]


def _points(steps: Steps, key: str) -> list[tuple[int, float]]:
    return [(step, values[key]) for step, values in steps.items() if key in values]


def _evaluation_charts(steps: Steps) -> Iterator[Chart]:
    """One chart per environment: the student's points between the two baselines."""
    by_env: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for step, metrics in steps.items():
        for env, values in evaluations(metrics).items():
            for name, value in values.items():
                by_env.setdefault(env, {}).setdefault(name, []).append((step, value))
    last = max(steps, default=0)
    for env, curves in by_env.items():
        series = []
        for name, points in curves.items():
            if name == "baseline_diff":
                continue
            if name.startswith("baseline_"):
                # A baseline is measured once. Drawn as a line, it compares with every point.
                value = points[-1][1]
                series.append(Series(name, [(0, value), (max(1, last), value)], flat=True))
            else:
                series.append(Series(name, points, marked=True))
        note = (
            "Mean reward on fixed tasks. The dashed lines show student and teacher before "
            "training; the student should climb from the lower to the upper one."
        )
        yield draw(f"Evaluation: {env}", note, series)
