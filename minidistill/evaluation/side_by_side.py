"""Answers before training, of the teacher and after training, for a few held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minidistill.envs.content import text_content
from minidistill.types import Prompt

KEPT = 16  # prompts


def kept(count: int) -> list[int]:
    """The indices of the prompts that are kept, evenly spaced among `count`."""
    number = min(KEPT, count)
    return [i * count // number for i in range(number)]


def before_training(
    prompts: Sequence[Prompt], student: Sequence[str], teacher: Sequence[str]
) -> list[dict[str, Any]]:
    """For each kept prompt: `env`, `task_id`, `prompt`, and the texts `before` and `teacher`.

    `prompts` and `student` have all held-out prompts, `teacher` the kept ones only.
    """
    return [
        {
            "env": prompts[i].env,
            "task_id": prompts[i].task.id,
            "prompt": text_content(prompts[i].task.messages[-1]["content"]) or "",
            "before": student[i],
            "teacher": text,
        }
        for i, text in zip(kept(len(prompts)), teacher, strict=True)
    ]


def after_training(rows: Sequence[dict[str, Any]], student: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `before_training` with the trained student's text as `after`."""
    return [row | {"after": student[i]} for row, i in zip(rows, kept(len(student)), strict=True)]
