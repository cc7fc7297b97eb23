"""Completions before training, of the teacher and after training, for a few held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minidistill.envs.content import text_content
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Completion, Prompt

KEPT = 16  # prompts


def kept(count: int) -> list[int]:
    """The indices of the prompts that are kept, evenly spaced among `count`."""
    number = min(KEPT, count)
    return [i * count // number for i in range(number)]


def before_training(
    builder: PromptBuilder,
    prompts: Sequence[Prompt],
    student: Sequence[Completion],
    teacher: Sequence[Completion],
) -> list[dict[str, Any]]:
    """For each kept prompt: `env`, `task_id`, `prompt`, and the texts `before` and `teacher`.

    `prompts` and `student` have all held-out prompts, `teacher` the kept ones only.
    """
    return [
        {
            "env": prompts[i].env,
            "task_id": prompts[i].task.id,
            "prompt": text_content(prompts[i].task.messages[-1]["content"]) or "",
            "before": builder.decode(student[i].token_ids),
            "teacher": builder.decode(completion.token_ids),
        }
        for i, completion in zip(kept(len(prompts)), teacher, strict=True)
    ]


def after_training(
    builder: PromptBuilder, rows: Sequence[dict[str, Any]], student: Sequence[Completion]
) -> list[dict[str, Any]]:
    """The rows of `before_training` with the trained student's text as `after`."""
    return [
        row | {"after": builder.decode(student[i].token_ids)}
        for row, i in zip(rows, kept(len(student)), strict=True)
    ]
