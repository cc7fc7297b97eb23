"""How the figures on unrelated prompts are read: by what the context is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minidistill.reporting.formatting import kl_level, number, percent

CHANGES = (
    "they are answered as before",
    "they are answered almost as before",
    "their answers have changed",
    "their answers have changed much",
)
"""By the level of KL(base‖student), see `formatting.KL_LEVELS`; the last from the third on."""


def judge_drift(board: Mapping[str, Any], *, has_task: bool) -> dict[str, Any]:
    """`drift_judged_by` ("base" or "teacher") and `drift_verdict`, a sentence or None.

    A context for a task should change nothing elsewhere: the base is the measure. A persona, a
    context without a task, should show everywhere: the teacher is.
    """
    judged_by = "base" if has_task else "teacher"
    text = _unchanged(board["drift_kl"]) if has_task else _followed(board)
    return {"drift_judged_by": judged_by, "drift_verdict": text}


def _unchanged(drift: float | None) -> str | None:
    level = kl_level(drift)
    if level is None:
        return None
    return (
        "The context is for a task, so unrelated prompts should be answered as before: "
        f"{CHANGES[min(level, len(CHANGES) - 1)]} (KL(base‖student) is {number(drift)} nats a token)."
    )


def _followed(board: Mapping[str, Any]) -> str | None:
    before, after = board["unrelated_kl_before"], board["unrelated_kl_after"]
    if after is None:
        return None
    start = "The context has no task, so it should show on unrelated prompts too: "
    share = board["unrelated_kl_closed"]
    if board["unrelated_kl_negligible"]:
        return f"{start}it hardly changes the teacher's answers to them, so there is no gap."
    if share is None:
        return f"{start}the KL to the teacher on them is {number(after)} nats a token now."
    low, high = board["unrelated_kl_closed_low"], board["unrelated_kl_closed_high"]
    bounds = "" if low is None else f" (95% interval {percent(low)} to {percent(high)})"
    return (
        f"{start}the KL to the teacher on them went from {number(before)} to {number(after)} nats "
        f"a token, {percent(share)} closed{bounds}."
    )
