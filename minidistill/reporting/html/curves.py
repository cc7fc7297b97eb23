"""Which curves the page shows, and how to read each."""

from __future__ import annotations

from collections.abc import Iterator

from minidistill.reporting.formatting import evaluations
from minidistill.reporting.html.chart import Chart, Series, draw

Steps = dict[int, dict[str, float]]

FIGURES = (
    (
        "Teacher KL",
        ("teacher_kl",),
        "KL(student‖teacher) on what the student writes, in nats a token. Lower is more similar; "
        "0 is a student that behaves as if it had read the context.",
    ),
    (
        "Reward",
        ("reward/mean",),
        "Mean reward of the training samples. The tasks change from step to step, so single steps "
        "are noisy; the evaluations above are on fixed tasks.",
    ),
    (
        "Loss",
        ("loss/policy", "loss/kl"),
        "The reward's part and the distillation part. The policy part goes around 0 by design: "
        "judge a run by reward and KL, not by this.",
    ),
    (
        "Entropy",
        ("entropy/student", "entropy/teacher"),
        "In nats a token. A student's entropy that falls to 0 while the teacher's does not is a "
        "collapse; the two should meet.",
    ),
    (
        "Completion length",
        ("completions/length_mean",),
        "Mean tokens of a completion. A steady climb to the limit often means that the end of "
        "the text is no longer learned.",
    ),
    (
        "Sampler mismatch",
        ("kl/sampler_mismatch",),
        "How far the sampler's probabilities are from the trainer's (ρ - log ρ - 1, mean). Near 0 "
        "where both compute the same; growth means stale weights or numerics that differ.",
    ),
)


def charts(steps: Steps) -> list[Chart]:
    """The figures that have data: evaluations first."""
    drawn = list(_evaluation_charts(steps))
    for title, keys, note in FIGURES:
        series = [Series(key, points) for key in keys if (points := _points(steps, key))]
        if series:
            drawn.append(draw(title, note, series))
    return [chart for chart in drawn if chart.lines]


def _points(steps: Steps, key: str) -> list[tuple[int, float]]:
    return [(step, values[key]) for step, values in steps.items() if key in values]


def _evaluation_charts(steps: Steps) -> Iterator[Chart]:
    """One chart for each environment: the student's points between the two baselines."""
    by_env: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for step, metrics in steps.items():
        for env, values in evaluations(metrics).items():
            for who, value in values.items():
                by_env.setdefault(env, {}).setdefault(who, []).append((step, value))
    last = max(steps, default=0)
    for env, found in by_env.items():
        series = []
        for who, points in found.items():
            if who == "baseline_diff":
                continue
            if who.startswith("baseline_"):
                # A baseline is measured once; as a line it can be compared with every point.
                value = points[-1][1]
                series.append(Series(who, [(0, value), (max(1, last), value)], flat=True))
            else:
                series.append(Series(who, points, marked=True))
        note = (
            "Mean reward on fixed tasks. The dashed lines are what student and teacher could do "
            "before training; the student should climb from the one to the other."
        )
        yield draw(f"Evaluation: {env}", note, series)
