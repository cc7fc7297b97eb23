"""The scoreboard as rows of text, for the displays and the report. Unknown values are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minidistill.reporting.formatting import clean, duration, number, percent, signed

Row = tuple[str, str]


def scoreboard_rows(board: Mapping[str, Any]) -> list[Row]:
    """(name, value) pairs in reading order, the gap first."""
    get = board.get
    rows = [("gap closed", gap(board))]
    if get("verdict") and get("gap_closed") is None:  # otherwise it repeats the line above
        rows.append(("verdict", clean(get("verdict"))))
    rows += [
        (name, number(get(key)))
        for name, key in (
            ("student before", "baseline_student"),
            ("student after", "student"),
            ("teacher", "baseline_teacher"),
            ("student with context", "student_with_context"),
        )
        if get(key) is not None
    ]
    if get("baseline_diff") is not None:
        rows.append(("teacher - student before", signed(get("baseline_diff"))))
    for name, before, after in (
        ("teacher KL", "teacher_kl_first", "teacher_kl_last"),
        ("teacher KL, held out", "heldout_kl_before", "heldout_kl_after"),
        ("length, tokens", "length_before", "length_after"),
    ):
        if get(before) is not None or get(after) is not None:
            rows.append((name, f"{number(get(before))} → {number(get(after))}"))
    if get("drift_kl") is not None:
        rows.append(("drift KL", number(get("drift_kl"))))
    if missing := get("missing"):
        rows.append(("not computed", clean(", ".join(missing))))
    return rows


def gap(board: Mapping[str, Any]) -> str:
    """The share of the gap that was closed, with its confidence interval."""
    if board.get("gap_closed") is None:
        return "–"
    text = percent(board["gap_closed"])
    low, high = board.get("gap_closed_low"), board.get("gap_closed_high")
    if low is None or high is None:
        return text
    return f"{text}  (95% interval {percent(low)} to {percent(high)})"


def effort(board: Mapping[str, Any]) -> str:
    """Steps, time, and number of tasks evaluated."""
    parts = []
    if board.get("steps") is not None:
        parts.append(f"{clean(board['steps'])} steps")
    if isinstance(board.get("seconds"), (int, float)):
        parts.append(f"in {duration(board['seconds'])}")
    if board.get("eval_tasks") is not None:
        parts.append(f"evaluated on {clean(board['eval_tasks'])} tasks")
    return ", ".join(parts).replace(", in ", " in ")


def env_rows(board: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(env, before, after, teacher, gap closed) if there are several environments."""
    per_env = board.get("per_env")
    if not isinstance(per_env, Mapping) or len(per_env) < 2:
        return []
    return [
        (
            clean(env),
            number(scores.get("baseline_student")),
            number(scores.get("student")),
            number(scores.get("baseline_teacher")),
            percent(scores.get("gap_closed")),
        )
        for env, scores in per_env.items()
        if isinstance(scores, Mapping)
    ]


def gap_share(board: Mapping[str, Any]) -> float | None:
    """The share of the gap that was closed, clipped to [0, 1], for a bar."""
    value = board.get("gap_closed")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return min(1.0, max(0.0, float(value)))
