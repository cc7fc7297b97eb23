"""The scoreboard as text, for the displays and the report. Unknown values are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minidistill.reporting.formatting import clean, duration, number, percent, signed

Row = tuple[str, str]
Board = Mapping[str, Any]

SHOWN = 3  # prompts whose completions a terminal shows
OUTCOMES = {
    "no_gap": "no gap",
    "context_harms": "worse with context",
    "too_few_tasks": "too few tasks",
}
"""What an environment's row says instead of a share, by outcome."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of a gap, with the figures at its ends."""

    share: float
    """Clipped to [0, 1]."""
    text: str
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A held-out prompt and its completions; – for one that is not there."""

    prompt: str
    before: str
    teacher: str
    after: str


def verdict(board: Board) -> str:
    """The sentence that leads the scoreboard."""
    return clean(board.get("verdict") or "The scoreboard has no verdict.")


def scoreboard_rows(board: Board) -> list[Row]:
    """(name, value) pairs in reading order, below the verdict."""
    get, rows = board.get, []
    if get("gap_closed") is not None:
        rows.append(("gap closed", share(board, "gap_closed")))
    # without a gap in the scores, a share of anything would look like one
    if get("heldout_kl_closed") is not None and (rows or get("judged_by") != "score"):
        rows.append(("teacher KL closed", share(board, "heldout_kl_closed")))
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
        ("teacher KL, unrelated", "unrelated_kl_before", "unrelated_kl_after"),
    ):
        if get(before) is not None or get(after) is not None:
            since = "" if get(before) is None else f"{number(get(before))} → "
            rows.append((name, f"{since}{number(get(after))}"))
    rows += _group_rows(board)
    if get("drift_kl") is not None:
        rows.append(("drift KL", number(get("drift_kl"))))
    if get("drift_verdict"):
        rows.append(("drift", clean(get("drift_verdict"))))
    for name, key in (("weights", "weights"), ("end", "stopped_early")):
        if get(key):
            rows.append((name, clean(get(key))))
    if isinstance(missing := get("missing"), list) and missing:
        rows.append(("not computed", clean(", ".join(map(str, missing)))))
    return rows


def _group_rows(board: Board) -> list[Row]:
    """The KL on held-out prompts by environment, and that of the worst context."""

    def change(figures: Mapping[str, Any]) -> str:
        before, after = figures.get("heldout_kl_before"), figures.get("heldout_kl_after")
        return f"{number(before)} → {number(after)}"

    rows = []
    per_env = board.get("heldout_kl_per_env")
    for env, figures in per_env.items() if isinstance(per_env, Mapping) else ():
        if isinstance(figures, Mapping):
            rows.append((f"teacher KL, {clean(env)}", change(figures)))
    worst = board.get("worst_context")
    if isinstance(worst, Mapping):
        count, evaluated = clean(board.get("contexts")), clean(board.get("contexts_evaluated"))
        rows.append(("contexts", f"{count}, of which {evaluated} were evaluated"))
        rows.append(("teacher KL, worst context", f"{change(worst)}, {clean(worst.get('name'))}"))
    return rows


def share(board: Board, key: str) -> str:
    """A share that was closed, with its confidence interval."""
    text = percent(board[key])
    low, high = board.get(f"{key}_low"), board.get(f"{key}_high")
    if low is None or high is None:
        return text
    return f"{text}  (95% interval {percent(low)} to {percent(high)})"


def bar(board: Board) -> Bar | None:
    """The share that the verdict is about; None without one."""
    by_teacher = board.get("gap_closed") is None and board.get("judged_by") == "teacher_kl"
    key = "heldout_kl_closed" if by_teacher else "gap_closed"
    value = board.get(key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    start = board.get("heldout_kl_before" if by_teacher else "baseline_student")
    end = 0 if by_teacher else board.get("baseline_teacher")
    clipped = min(1.0, max(0.0, float(value)))
    return Bar(clipped, percent(value), number(start), number(end))


def effort(board: Board) -> str:
    """Steps, time, and number of tasks evaluated."""
    parts = []
    if board.get("steps") is not None:
        parts.append(f"{clean(board['steps'])} step{'' if board['steps'] == 1 else 's'}")
    if isinstance(board.get("seconds"), (int, float)):
        parts.append(f"in {duration(board['seconds'])}")
    for key, unit in (("eval_tasks", "task"), ("heldout_kl_prompts", "prompt")):
        if (count := board.get(key)) is not None:
            parts.append(f"evaluated on {clean(count)} {unit}{'' if count == 1 else 's'}")
            break
    return ", ".join(parts).replace(", in ", " in ")


def env_rows(board: Board) -> list[tuple[str, str, str, str, str]]:
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
            OUTCOMES.get(str(scores.get("outcome")), percent(scores.get("gap_closed"))),
        )
        for env, scores in per_env.items()
        if isinstance(scores, Mapping)
    ]


def side_by_side(board: Board, characters: int | None = None) -> list[SideBySide]:
    """The kept completions, each on one line of at most `characters` if that is given."""
    rows = board.get("completions")
    if not isinstance(rows, list):
        return []

    def text(row: Mapping[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None:
            return "–"
        if characters is None:
            return str(value)
        line = " ".join(clean(value).split())
        return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"

    names = ("prompt", "before", "teacher", "after")
    return [
        SideBySide(*(text(row, name) for name in names)) for row in rows if isinstance(row, Mapping)
    ]


def shown_completions(board: Board, characters: int) -> list[SideBySide]:
    """The few completions that a terminal shows: where no score says what changed."""
    if board.get("judged_by") == "score":
        return []
    return side_by_side(board, characters)[:SHOWN]
