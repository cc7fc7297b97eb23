"""The scoreboard's scores: means, and the gap closed with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minidistill.evaluation.intervals import (
    CLOSED,
    MIN_TASKS,
    PromptSums,
    kl_closed,
    percentiles,
    picks,
    ratios,
)
from minidistill.evaluation.verdict import judge_scores
from minidistill.reporting.run_directory import finite


def compare(
    student_before: Sequence[float],
    teacher: Sequence[float],
    student: Sequence[float] | None,
    with_context: Sequence[float] | None,
    seed: int,
) -> dict[str, Any]:
    """Means and the gap closed over one set of tasks.

    Each sequence has a mean reward for each task, in the same order. The gap closed is
    (student - before) / (teacher - before). Its 95% interval is a percentile bootstrap over tasks
    (10,000 resamples, all figures of a task drawn together). `gap_closed` is None if there is no
    gap to close: the interval of the baseline difference includes 0, or the context makes the score
    worse. With fewer than `MIN_TASKS` tasks there is no interval, and so no verdict on a gap. An
    interval without width, where all tasks agree, is None.
    """
    before, in_context = np.asarray(student_before), np.asarray(teacher)
    difference = float(in_context.mean() - before.mean())
    board: dict[str, Any] = {
        "baseline_student": float(before.mean()),
        "baseline_teacher": float(in_context.mean()),
        "baseline_diff": difference,
        "baseline_diff_low": None,
        "baseline_diff_high": None,
        "student": None if student is None else float(np.mean(student)),
        "student_with_context": None if with_context is None else float(np.mean(with_context)),
        "gap_closed": None,
        "gap_closed_low": None,
        "gap_closed_high": None,
        "eval_tasks": len(before),
    }
    if len(before) >= MIN_TASKS:
        chosen = picks(len(before), seed)
        differences = (in_context - before)[chosen].mean(axis=1)
        interval = percentiles(differences)
        if interval is not None:
            board |= {"baseline_diff_low": interval.low, "baseline_diff_high": interval.high}
        lowest = difference if interval is None else interval.low
        if student is not None and lowest > 0:
            board["gap_closed"] = float((np.mean(student) - before.mean()) / difference)
            gains = (np.asarray(student) - before)[chosen].mean(axis=1)
            if (share := percentiles(ratios(gains, differences))) is not None:
                board |= {"gap_closed_low": share.low, "gap_closed_high": share.high}
    return board | judge_scores(board)


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
        board |= judge_scores(board)
    if len(rewards) > 1:
        board["per_env"] = {name: build({name: values}, seed) for name, values in rewards.items()}
    return board


def teacher_kl(
    name: str, before: PromptSums | None, after: PromptSums | None, seed: int
) -> dict[str, Any]:
    """The KL to the teacher before and after training, and the share closed: see `kl_closed`.

    The keys are `NAME_before`, `NAME_after`, `NAME_closed` and so on. All but `NAME_after` are
    None without `before`. `NAME_not_finite` is there if `after` is no number.
    """
    figures: dict[str, Any] = dict.fromkeys(("prompts", "negligible", *CLOSED))
    if before is not None:
        figures = kl_closed(before, after, seed)
    means = {
        "before": None if before is None else finite(before.mean),
        "after": None if after is None else finite(after.mean),
    }
    if after is not None and means["after"] is None:
        figures["not_finite"] = True  # or it would look like one that is not measured yet
    return {f"{name}_{key}": value for key, value in (means | figures).items()}
