"""The KL to the teacher on held-out prompts, by environment and by context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.scoreboard import teacher_kl
from minidistill.reporting.run_directory import finite
from minidistill.types import Prompt

Groups = dict[str, list[int]]


def by_environment(
    prompts: Sequence[Prompt], before: PromptSums | None, after: PromptSums, seed: int
) -> dict[str, Any]:
    """`heldout_kl_per_env`: the figures of `teacher_kl`; empty if there is one environment."""
    groups = _grouped(prompts, lambda prompt: prompt.env)
    if len(groups) < 2:
        return {}
    figures = {
        name: teacher_kl(
            "heldout_kl", None if before is None else before.part(rows), after.part(rows), seed
        )
        for name, rows in groups.items()
    }
    return {"heldout_kl_per_env": figures}


def by_context(
    prompts: Sequence[Prompt], before: PromptSums | None, after: PromptSums, count: int
) -> dict[str, Any]:
    """`contexts`, the `count` of the run's, and which of those evaluated is the worst.

    It is the one with the largest KL to the teacher after training, in nats a token. Empty if the
    run has one context.
    """
    if count < 2:
        return {}
    names = {prompt.context.text: prompt.context.name for prompt in prompts}
    groups = _grouped(prompts, lambda prompt: prompt.context.text)
    worst = max(groups, key=lambda text: _badness(after.part(groups[text])))
    known = None if before is None else before.part(groups[worst])
    return {
        "contexts": count,
        "contexts_evaluated": len(groups),
        "worst_context": {
            "name": names[worst],
            "prompts": len(groups[worst]),
            "heldout_kl_before": None if known is None else finite(known.mean),
            "heldout_kl_after": finite(after.part(groups[worst]).mean),
        },
    }


def _grouped(prompts: Sequence[Prompt], key: Callable[[Prompt], str]) -> Groups:
    groups: Groups = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(key(prompt), []).append(row)
    return groups


def _badness(sums: PromptSums) -> float:
    return math.inf if math.isnan(sums.mean) else sums.mean
