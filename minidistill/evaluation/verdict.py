"""What the scoreboard concludes from its figures, as a word (`outcome`) and as a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minidistill.evaluation.intervals import MIN_TASKS
from minidistill.reporting.formatting import number, percent, signed

CLOSED, CLOSED_LOW = 0.9, 0.8
"""A gap counts as closed if this share is, and its interval is above the lower bound."""
ENOUGH_TASKS = 100
"""Tasks whose mean of scores of 0 or 1 has an interval of ±10 points at worst."""

Board = Mapping[str, Any]

LEARNED = {
    "closed": "Without the context, the student does almost everything the teacher does with it",
    "partly": "The student learned part of what the context does",
    "none": "The student learned nothing measurable from the context",
    "worse": "The student moved away from what the context does",
}
"""By outcome, if there was a gap to close."""
NOTHING_TO_CLOSE = ("no_gap", "context_harms")
"""The outcomes without a gap, which are known before step 1."""
NO_BASELINE = (
    "There is no baseline, so nothing can be said about what the student learned: set "
    "[orchestrator.eval], and eval_baseline = true if there is a reward."
)
NOT_FINISHED = "The run has not finished, and what the student learned is not measured yet."
NOT_FINITE = "The KL to the teacher is not a finite number, so nothing can be said about it."
SCORES_NOT_FINITE = "A mean score is not a finite number, so nothing can be said about the gap."
NO_REWARD = "No environment has a reward, so the teacher is the measure."
NO_SCORES = (
    "The scores before training are not known (eval_baseline is false), so the teacher is the "
    "measure."
)


def judge_scores(board: Board) -> dict[str, Any]:
    """`outcome` and `verdict` from the figures of `scoreboard.compare`."""
    difference, after = board["baseline_diff"], board["student"]
    if difference is None:
        return _judged("no_baseline", NO_BASELINE)
    tasks = board["eval_tasks"]
    if tasks < MIN_TASKS:
        return _judged("too_few_tasks", too_few(tasks, "task"))
    low, high = board["baseline_diff_low"], board["baseline_diff_high"]
    figures = (difference, board["baseline_student"], after, low, high)
    if not all(figure is None or math.isfinite(figure) for figure in figures):
        return _judged("not_finite", SCORES_NOT_FINITE)
    before, everywhere = number(board["baseline_student"]), f"the same on each of the {tasks} tasks"
    scores = f"{before} → {number(board['baseline_teacher'])}, " + (
        everywhere
        if low is None
        else f"95% interval of the difference {signed(low)} to {signed(high)}"
    )
    change = "" if after is None else f" The student went from {before} to {number(after)}."
    if after == board["baseline_student"]:
        change = f" The student stayed at {before}."
    if (difference if high is None else high) < 0:
        text = f"The context makes the score worse ({scores}): there is no gap to close."
        return _judged("context_harms", text + change)
    if (difference if low is None else low) <= 0:
        why = "the context does not make the score better"
        if difference > 0:
            why = "the gain in score from the context is within chance"
        return _judged("no_gap", f"There is no gap to close: {why} ({scores})." + change)
    if after is None:
        return _judged("not_finished", NOT_FINISHED)
    return _closed(board, "gap_closed", "the gap", everywhere)


def judge(board: Board) -> dict[str, Any]:
    """`outcome`, `verdict` and `judged_by` of a whole board.

    The scores decide if both roles were evaluated before training, else the KL to the teacher.
    """
    if board["baseline_diff"] is not None:
        return judge_scores(board) | {"judged_by": "score"}
    if board["heldout_kl_prompts"] is None:
        return _judged("no_baseline", NO_BASELINE) | {"judged_by": None}
    judged = judge_teacher_kl(board)
    judged["verdict"] += f" {NO_REWARD if board['env'] is None else NO_SCORES}"
    return judged | {"judged_by": "teacher_kl"}


def judge_teacher_kl(board: Board) -> dict[str, Any]:
    """`outcome` and `verdict` from the KL on held-out prompts: see `intervals.kl_closed`."""
    prompts, before = board["heldout_kl_prompts"], board["heldout_kl_before"]
    if prompts < MIN_TASKS:
        return _judged("too_few_tasks", too_few(prompts, "prompt"))
    on_prompts = f"the KL to the teacher on {prompts} held-out prompts"
    if board["heldout_kl_negligible"]:
        text = "There is no gap to close: the context hardly changes what the student writes"
        return _judged("no_gap", f"{text} ({on_prompts} is {number(before)} nats a token).")
    not_finite = board.get("heldout_kl_not_finite", False)
    if board["heldout_kl_after"] is None and not not_finite:
        return _judged("not_finished", NOT_FINISHED)
    if not_finite or board["heldout_kl_closed"] is None:
        return _judged("not_finite", NOT_FINITE)
    everywhere = f"the same on each of the {prompts} prompts"
    return _closed(board, "heldout_kl_closed", on_prompts, everywhere)


def grade(share: float, low: float | None, high: float | None) -> str:
    """closed, partly, none or worse. Without an interval all tasks have the same share."""
    low, high = share if low is None else low, share if high is None else high
    if share >= CLOSED and low >= CLOSED_LOW:
        return "closed"
    return "partly" if low > 0 else "worse" if high < 0 else "none"


def points(tasks: int) -> float:
    """Half of the widest 95% interval that a mean of scores of 0 or 1 has, in points of 100."""
    return 98 / math.sqrt(tasks)


def too_few(count: int, what: str) -> str:
    """A sentence for fewer than `MIN_TASKS` tasks or prompts, which `what` names."""
    return (
        f"{count} held-out {what + 's are' if count != 1 else what + ' is'} too few to judge by: "
        f"{MIN_TASKS} give an interval, and {ENOUGH_TASKS} a narrow one."
    )


def _closed(board: Board, key: str, what: str, everywhere: str) -> dict[str, Any]:
    """The judgement of the share under `key`. `everywhere` stands in for its interval."""
    share, low, high = board[key], board[f"{key}_low"], board[f"{key}_high"]
    outcome = grade(share, low, high)
    learned, found = LEARNED[outcome], f"{percent(share)} of {what} is closed"
    if outcome == "partly" and high is not None and high >= 1:
        learned = learned.replace("part", "at least part")
    if outcome == "worse":
        found = f"{what} grew by {percent(-share)}"
        low, high = (None, None) if low is None else (-high, -low)
    bounds = everywhere if low is None else f"95% interval {percent(low)} to {percent(high)}"
    return _judged(outcome, f"{learned}: {found} ({bounds}).")


def _judged(outcome: str, verdict: str) -> dict[str, Any]:
    return {"outcome": outcome, "verdict": verdict}
