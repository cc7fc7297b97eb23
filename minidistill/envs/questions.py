"""`questions`: what people ask an assistant, to evaluate a model that is trained on other prompts.

They ship with the package, as `configs/questions.jsonl`.
"""

from __future__ import annotations

from typing import Any

from minidistill.config import shipped
from minidistill.envs.jsonl import JsonlEnv
from minidistill.envs.jsonl.env import check_counts, read_dataset
from minidistill.envs.jsonl.lines import refusal
from minidistill.envs.rewards import build


def load(reward: str | dict[str, Any] | None = None, num_eval_examples: int = 64) -> JsonlEnv:
    """The 96 questions, of which the first `num_eval_examples` are held out.

    `reward` is that of `jsonl`, one that needs no answer. Raises UserError for an argument that it
    cannot use.
    """
    check_counts(None, num_eval_examples, 0)
    lines = read_dataset(str(shipped.folder() / "questions.jsonl"), {}, "questions")
    if num_eval_examples >= len(lines):
        fix = f"use fewer than {len(lines)}, the number of questions"
        raise refusal("num_eval_examples", num_eval_examples, fix)
    scoring = None if reward in (None, "none") else build(reward)
    return JsonlEnv(lines[num_eval_examples:], lines[:num_eval_examples], reward, scoring)
