"""How the figures on unrelated prompts are read: by what the context is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minidistill.reporting.formatting import kl_level, number, percent

CHANGES = (
    "and they do",
    "and they almost do",
    "but they have changed",
    "but they have changed much",
)
"""By the level of KL(base‖student), see `formatting.KL_LEVELS`. The last is for levels 3 and 4."""
LEVELS = "are as they were", "are almost as they were", "have changed", "have changed much"
"""The same, without a judgement."""


def judge_drift(board: Mapping[str, Any], *, has_task: bool) -> dict[str, Any]:
    """`drift_judged_by` ("base" or "teacher") and `drift_verdict`, a text or None.

    A context for a task should change nothing elsewhere: the base is the measure. A persona, a
    context without a task, should show everywhere: the teacher is. Where the teacher's answers to
    unrelated prompts are not known, the text says what changed and leaves the judgement.
    """
    judged_by = "base" if has_task else "teacher"
    text = _unchanged(board) if has_task else _followed(board)
    return {"drift_judged_by": judged_by, "drift_verdict": text}


def _unchanged(board: Mapping[str, Any]) -> str | None:
    drift, teacher_kl = board["drift_kl"], board["unrelated_kl_after"]
    level = kl_level(drift)
    if level is None:
        return None
    if teacher_kl is None:  # a program sends the context, and none of its requests is unrelated
        changed = LEVELS[min(level, len(LEVELS) - 1)]
        return (
            f"The answers to unrelated prompts {changed} (drift KL {number(drift)}). They should "
            "stay as they were if the context is for a task, and change if it is a persona."
        )
    return (
        "The context is for a task, so the answers to unrelated prompts should stay as they were, "
        f"{CHANGES[min(level, len(CHANGES) - 1)]} (drift KL {number(drift)}). "
        "The teacher KL on them is not a goal here."
    )


def _followed(board: Mapping[str, Any]) -> str | None:
    after = board["unrelated_kl_after"]
    if after is None:
        return None
    share, drift = board["unrelated_kl_closed"], board["drift_kl"]
    if board["unrelated_kl_negligible"]:
        found = "it hardly changes the teacher's answers there, so there is no gap"
    elif share is None:
        found = f"the KL to the teacher there is {number(after)} now"
    else:
        low, high = board["unrelated_kl_closed_low"], board["unrelated_kl_closed_high"]
        closed = share >= 0
        if low is not None and not closed:
            low, high = -high, -low  # of the growth
        bounds = "" if low is None else f" (95% interval {percent(low)} to {percent(high)})"
        found = f"{percent(share)} of the KL to the teacher there is closed{bounds}"
        if not closed:
            found = f"the KL to the teacher there has grown by {percent(-share)}{bounds}"
    text = f"The context has no task, so it should show on unrelated prompts too: {found}."
    if drift is not None and not board["unrelated_kl_negligible"]:
        text += " The drift from the base is expected."
    return text
