"""Checks of the two views of the prompts. They need no model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from minidistill.config import Config
from minidistill.envs.multi_turn import multi_turn
from minidistill.envs.protocol import Environment
from minidistill.errors import UserError
from minidistill.tasks.chat_template import ChatTemplate
from minidistill.tasks.conversation import extends
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Message, Prompt

Ids = tuple[int, ...]

logger = logging.getLogger(__name__)


def check_prompts(config: Config, builder: PromptBuilder, prompts: Sequence[Prompt]) -> None:
    """Check both views of the prompts. Needs no model.

    Raises UserError if the chat template does not render them correctly.
    """
    first = prompts[0]
    for template in (builder.student, builder.teacher):
        if template.render(first.task.messages) != template.render(first.task.messages):
            raise UserError(
                "the chat template renders the same messages differently each time",
                where=template.where,
                fix="use a chat template whose text depends on the messages alone",
            )
    _check_generation_prompt(builder.student, first.task.messages, first.student_ids, "student")
    with_context = builder.with_context(first.task.messages, first.context.text)
    _check_generation_prompt(builder.teacher, with_context, first.teacher_ids, "teacher")
    if config.orchestrator.sample_from == "teacher":
        _check_ends_of_turns(builder)
    _warn_of_turns_without_end(builder)
    if any(prompt.context.text.strip() not in prompt.teacher_text for prompt in prompts):
        logger.warning("the chat template does not show the context verbatim")
    for warning in dict.fromkeys(filter(None, map(builder.boundary_warning, prompts))):
        logger.warning(warning)
    loss = config.trainer.loss
    if loss.teacher_tau != loss.student_tau and loss.student_tau > 0 and loss.teacher_tau > 0:
        power = loss.teacher_tau / loss.student_tau
        kind = "sharpened" if power > 1 else "flattened"
        logger.warning(
            f"teacher_tau and student_tau differ: the distillation term's fixed point is the "
            f"{kind} teacher q^{power:g}, not q"
        )


def check_conversations(
    builder: PromptBuilder, environments: Mapping[str, Environment], prompts: Sequence[Prompt]
) -> None:
    """Check that multi-turn environments can be run. `prompts` has one of each environment.

    Raises UserError if the chat template has no place for an answer, or if the teacher has its own.
    """
    conversing = multi_turn(environments)
    if not conversing:
        return
    name = next(iter(conversing))
    if builder.teacher is not builder.student:
        raise UserError(
            f"the environment {name!r} is multi-turn, and the teacher has a chat template of its "
            "own: it would not read what the student's template writes between two turns",
            where=builder.teacher.where,
            fix="use a teacher with the student's chat template, or a single-turn environment",
        )
    if not builder.student.shows_turns:
        raise UserError(
            f"the environment {name!r} is multi-turn, and the chat template does not show answers",
            where=builder.student.where,
            fix="set model.chat_template to a file with another, or use a single-turn environment",
        )
    first = next(prompt for prompt in prompts if prompt.env == name)
    if not extends(builder, first):
        logger.warning(
            "the chat template changes a turn when another follows, as those do that drop thinking "
            "from earlier turns: each turn of a conversation is a training sample of its own"
        )


def _check_generation_prompt(
    template: ChatTemplate, messages: Sequence[Message], ids: Ids, view: str
) -> None:
    """Check that a prompt ends where the assistant's answer begins."""
    ending = template.generation_prompt(messages)
    if ids[len(ids) - len(ending) :] != ending:
        text = template.tokenizer.decode(list(ending))
        raise UserError(
            f"the {view}'s prompt does not end in the template's generation prompt {text!r}",
            where=template.where,
            fix="use a chat template that supports add_generation_prompt",
        )
    if header := template.unopened_turn(messages):
        raise UserError(
            f"the {view}'s prompt does not begin the assistant's turn: the chat template writes "
            f"{header!r} before an answer, but not at the end of a prompt",
            where=template.where,
            fix="use a chat template that supports add_generation_prompt",
        )


def _check_ends_of_turns(builder: PromptBuilder) -> None:
    """Check that the teacher's samples end as the student's turns do."""
    if len(builder.end_of_turn_ids) > 1:
        ends = builder.tokenizer.convert_ids_to_tokens(sorted(builder.end_of_turn_ids))
        raise UserError(
            f"the two chat templates end a turn with different tokens ({', '.join(ends)}), and the "
            "student would learn to end its answers with the teacher's",
            where="orchestrator.sample_from",
            fix='set orchestrator.sample_from = "student", or use a teacher with the chat template '
            "of the student",
        )


def _warn_of_turns_without_end(builder: PromptBuilder) -> None:
    """Warn if no token ends an answer, or if the teacher expects another one."""
    student = builder.student
    if student.shows_turns and student.end_of_turn is None:
        logger.warning(
            "the chat template ends an answer with no token of its own: completions end at the "
            "end-of-sequence token, which the model may never write, or at max_tokens"
        )
    if len(builder.end_of_turn_ids) > 1:
        ends = builder.tokenizer.convert_ids_to_tokens(sorted(builder.end_of_turn_ids))
        logger.warning(
            f"the two chat templates end a turn with different tokens ({', '.join(ends)}): the "
            "teacher scores one that it does not expect"
        )
