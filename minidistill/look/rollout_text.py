"""A rollout as text: both prompts, and the completion colored by how much the teacher disagrees.

All of it is untrusted: no markup is read, no control character is passed on, and texts are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from rich.text import Text

from minidistill.errors import bounded, printable
from minidistill.look.rollouts import Recorded
from minidistill.reporting.formatting import clean, kl_level, number
from minidistill.reporting.terminal.tokens import STYLES, UNKNOWN, legend

LONGEST = 20_000
"""Characters of a prompt or a completion that are shown."""
WORST = 5
"""Tokens that are named below a completion."""
ADDED = "cyan"
"""What the teacher alone reads."""


def rollout_text(rollout: Recorded, place: str, *, colored: bool) -> Text:
    """All of a rollout. `place` says which one it is of how many."""
    text = Text()
    _append(text, f"{_title(rollout)}  {place}\n", "bold")
    _append(text, f"{_facts(rollout)}\n\n", "dim")
    student = _shown(rollout.row.get("prompt_text"))
    _append(text, "student's prompt\n", "bold")
    _append(text, f"{student}\n\n")
    _append(text, "teacher's prompt\n", "bold")
    for part, style in _added(student, _shown(rollout.row.get("teacher_prompt_text"))):
        _append(text, part, style)
    _append(text, "\n\n")
    _append(text, "completion\n", "bold")
    for part, kl in _pieces(rollout):
        level = kl_level(kl)
        text.append(part, UNKNOWN if level is None else STYLES[level])
    _append(text, "\n\n")
    if worst := _worst(rollout):
        _append(text, f"most disagreement: {worst}\n", "dim")
    if colored:
        text.append(legend()).append("\n")
    return text


def _append(text: Text, part: str, style: str = "") -> None:
    text.append(part, style or None)


def _title(rollout: Recorded) -> str:
    row = rollout.row
    parts = [
        f"step {rollout.step}",
        f"task {clean(rollout.task)}",
        f"sample {clean(row.get('sample', 0))}",
        clean(row.get("env", "")),
    ]
    if row.get("part"):
        parts.insert(3, f"part {clean(row['part'])}")
    return "  ".join(parts)


def _facts(rollout: Recorded) -> str:
    row = rollout.row
    figures = {
        "reward": row.get("reward"),
        "advantage": row.get("advantage"),
        "mean KL": rollout.mean_kl,
        "tokens": len(rollout.kl),
    }
    facts = [f"{name} {number(value)}" for name, value in figures.items()]
    facts.append(f"stop {clean(row.get('stop', ''))}")
    if row.get("context") not in (None, "context"):
        facts.append(f"context {clean(row['context'])}")
    metrics = row.get("reward_metrics")
    if isinstance(metrics, dict):
        facts += [f"{clean(name)} {number(value)}" for name, value in metrics.items()]
    return bounded("  ".join(facts))


def _shown(text: object) -> str:
    return printable(bounded(str(text or ""), LONGEST))


def _added(student: str, teacher: str) -> Iterator[tuple[str, str]]:
    """The teacher's prompt in three parts, of which the second is not in the student's."""
    start = _equal(student, teacher)
    end = min(_equal(student[::-1], teacher[::-1]), min(len(student), len(teacher)) - start)
    stop = len(teacher) - end
    yield teacher[:start], ""
    yield teacher[start:stop], ADDED
    yield teacher[stop:], ""


def _equal(first: str, second: str) -> int:
    """How many characters both begin with."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )


def _pieces(rollout: Recorded) -> Iterator[tuple[str, float | None]]:
    """The texts of the tokens, each with its KL, and between them what an environment wrote."""
    inserted: dict[int, str] = {}
    for each in _list(rollout.row.get("inserted")):
        if isinstance(each, dict) and isinstance(each.get("at"), int):
            inserted[each["at"]] = inserted.get(each["at"], "") + str(each.get("text", ""))
    left, hidden = LONGEST, 0
    tokens = rollout.row["tokens"]
    for index, (token, kl) in enumerate(zip(tokens, rollout.kl, strict=True)):
        for part, value in ((inserted.get(index, ""), None), (token, kl)):
            shown = printable(bounded(part, max(left, 0)) if left > 0 else "")
            hidden += part != "" and left <= 0
            left -= len(part)
            if shown:
                yield shown, value
    if (last := inserted.get(len(tokens), "")) and left > 0:
        yield printable(bounded(last, left)), None
    if hidden:
        yield f"… ({hidden} more tokens)", None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _worst(rollout: Recorded) -> str:
    """The tokens that the teacher disagrees with most, each with its KL. NaN comes first."""
    tokens = list(zip(rollout.row["tokens"], rollout.kl, strict=True))
    tokens.sort(key=lambda pair: -math.inf if math.isnan(pair[1]) else -pair[1])
    return ", ".join(f"{clean(token)[:40]!r} {number(kl)}" for token, kl in tokens[:WORST])
