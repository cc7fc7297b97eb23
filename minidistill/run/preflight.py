"""Checks of the two views of the prompts. They need no model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Prompt, Task

logger = logging.getLogger(__name__)


def check_prompts(config: Config, builder: PromptBuilder, prompts: Sequence[Prompt]) -> None:
    """Check both views of the prompts. Needs no model.

    Raises UserError if the chat template does not render them correctly.
    """
    first = prompts[0]
    ending = generation_prompt(builder, first.task)
    for view, text in (("student", first.student_text), ("teacher", first.teacher_text)):
        if not text.endswith(ending):
            raise UserError(
                f"the {view}'s prompt does not end in the template's generation prompt {ending!r}",
                where="model.name",
                fix="use a chat template that supports add_generation_prompt",
            )
    without_context = PromptBuilder(builder.tokenizer, "", builder.placement)
    equal_views = without_context.build("", first.task)
    if equal_views.student_ids != equal_views.teacher_ids:
        raise UserError(
            "the two views differ even with an empty context",
            where="model.name",
            fix="use a chat template that renders the same messages the same way",
        )
    if builder.context.strip() not in first.teacher_text:
        logger.warning("the chat template does not show the context verbatim")
    if warning := builder.boundary_warning(first):
        logger.warning(warning)
    loss = config.trainer.loss
    if loss.teacher_tau != loss.student_tau and loss.student_tau > 0 and loss.teacher_tau > 0:
        power = loss.teacher_tau / loss.student_tau
        kind = "sharpened" if power > 1 else "flattened"
        logger.warning(
            f"teacher_tau and student_tau differ: the distillation term's fixed point is the "
            f"{kind} teacher q^{power:g}, not q"
        )


def generation_prompt(builder: PromptBuilder, task: Task) -> str:
    """What the template writes to start the assistant's turn."""
    messages = [dict(m) for m in task.messages]
    closed = str(builder.tokenizer.apply_chat_template(messages, tokenize=False))
    return builder.render(messages).removeprefix(closed)
