"""The scoreboard: mean rewards, and the gap closed with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
MIN_TASKS = 8  # a bootstrap over fewer says next to nothing about other tasks


def compare(
    student_before: Sequence[float],
    teacher: Sequence[float],
    student: Sequence[float] | None,
    with_context: Sequence[float] | None,
    seed: int,
) -> dict[str, Any]:
    """Means and the gap closed over one set of tasks.

    Each sequence has a mean reward for each task, in the same order. The gap closed is
    (student - before) / (teacher - before). Its 95 % interval is a percentile bootstrap over tasks
    (10,000 resamples, all figures of a task drawn together). If the interval of the baseline
    difference includes 0, there is no gap to close, and `gap_closed` is None. With fewer than
    `MIN_TASKS` tasks there is no interval, and so no verdict on a gap.
    """
    before, in_context = np.asarray(student_before), np.asarray(teacher)
    difference = float(in_context.mean() - before.mean())
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(before), size=(RESAMPLES, len(before)))
    differences = (in_context - before)[picks].mean(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    board: dict[str, Any] = {
        "baseline_student": float(before.mean()),
        "baseline_teacher": float(in_context.mean()),
        "baseline_diff": difference,
        "baseline_diff_low": float(low),
        "baseline_diff_high": float(high),
        "student": None if student is None else float(np.mean(student)),
        "student_with_context": None if with_context is None else float(np.mean(with_context)),
        "gap_closed": None,
        "gap_closed_low": None,
        "gap_closed_high": None,
        "eval_tasks": len(before),
    }
    if len(before) < MIN_TASKS:
        board |= {"baseline_diff_low": None, "baseline_diff_high": None}
        board["verdict"] = f"{len(before)} tasks are too few for an interval: evaluate {MIN_TASKS}"
        return board
    if low <= 0 <= high:
        board["verdict"] = "no gap: the context changes the score by no more than chance"
        return board
    if student is None:
        board["verdict"] = "not finished"
        return board
    gains = (np.asarray(student) - before)[picks].mean(axis=1)
    # a resample without a difference has no ratio; few are like that if the interval excludes 0
    ratios = np.divide(gains, differences, out=np.full(RESAMPLES, np.nan), where=differences != 0)
    board["gap_closed"] = float((np.mean(student) - before.mean()) / difference)
    board["gap_closed_low"], board["gap_closed_high"] = map(
        float, np.nanquantile(ratios, [0.025, 0.975])
    )
    if difference < 0:
        board["verdict"] = "the context makes the model worse on this task"
    else:
        board["verdict"] = (
            f"{board['gap_closed']:.0%} of the gap closed "
            f"(95 % interval {board['gap_closed_low']:.0%} to {board['gap_closed_high']:.0%})"
        )
    return board


def pooled(per_env: Mapping[str, Mapping[str, Sequence[float]]], key: str) -> list[float] | None:
    """All environments' values of one kind in one list; None if an environment has none."""
    if not per_env or any(key not in values for values in per_env.values()):
        return None
    return [value for values in per_env.values() for value in values[key]]


def build(rewards: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, Any]:
    """The scored part of the scoreboard, pooled and for each environment.

    `rewards[env]` may hold baseline_student, baseline_teacher, student and student_with_context.
    """
    board: dict[str, Any] = {"env": "+".join(rewards) or None}
    before, teacher = pooled(rewards, "baseline_student"), pooled(rewards, "baseline_teacher")
    student, context = pooled(rewards, "student"), pooled(rewards, "student_with_context")
    if before and teacher:
        board |= compare(before, teacher, student, context, seed)
    else:
        missing = ("baseline_student", "baseline_teacher", "baseline_diff", "gap_closed")
        board |= dict.fromkeys((*missing, "gap_closed_low", "gap_closed_high"))
        board["student"] = float(np.mean(student)) if student else None
        board["student_with_context"] = float(np.mean(context)) if context else None
        board["verdict"] = "no baseline was evaluated"
    if len(rewards) > 1:
        board["per_env"] = {name: build({name: values}, seed) for name, values in rewards.items()}
    return board
