"""The two views of a prompt: the student's, and the teacher's with the context added.

Both are rendered with the tokenizer's chat template and differ in the context alone, unless the
teacher is another model with a template of its own. A completion is never tokenized again: its
sampled ids are appended to either view.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minidistill.envs.strip import Strip
from minidistill.errors import EXIT_FAILED, UserError
from minidistill.tasks.chat_template import (
    MARK,
    ChatTemplate,
    TemplateSettings,
    check_arguments,
    tokenizer_code,
)
from minidistill.tasks.contexts import Contexts
from minidistill.tasks.messages import plain_messages
from minidistill.types import Context, Message, Prompt, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SEAM = 16  # characters on either side of a seam, in a warning


class PromptBuilder:
    """Renders tasks for student and teacher.

    `placement` "user" puts the context before the text of the first user message. "system" puts it
    at the end of the system message; if there is none, one is added that begins with the template's
    default system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: str | Contexts,
        placement: str,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        settings: TemplateSettings | None = None,
    ) -> None:
        """`context` is the one of every prompt, or says which one has which.

        `teacher_tokenizer` is that of a teacher that is another model.

        Raises UserError if a chat template is missing or cannot be used with these settings.
        """
        self.tokenizer, self.placement = tokenizer, placement
        self.contexts = Contexts.single(context) if isinstance(context, str) else context
        settings = TemplateSettings() if settings is None else settings
        self.student = self.teacher = ChatTemplate(tokenizer, settings)
        """The templates of the two views, the same one unless the teacher has its own."""
        if teacher_tokenizer is not None and _own_template(teacher_tokenizer, tokenizer):
            where = "teacher_inference.model.name"
            self.teacher = ChatTemplate(teacher_tokenizer, settings, where)
        check_arguments([self.student, self.teacher])
        self._default_system: str | None = None
        self._control_tokens_said: set[str] = set()
        self._last_context: str | None = None

    @cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The tokens that end an answer in the chat templates."""
        ends = {self.student.end_of_turn, self.teacher.end_of_turn}
        return frozenset(end for end in ends if end is not None)

    @property
    def began(self) -> datetime | None:
        """The present that chat templates show, if one of them shows it."""
        shown = self.student.dates or self.teacher.dates
        return self.student.settings.now if shown else None

    def variants(self, env: str, task: Task, chosen: Sequence[int] | None = None) -> list[Prompt]:
        """Both views of a task with each context that it may have, or those with these indices."""
        contexts = self.contexts.every(env, task, chosen)
        return [self.build(env, task, context=context) for context in contexts]

    def build(
        self,
        env: str,
        task: Task,
        tools: Sequence[Any] | None = None,
        *,
        step: int = 0,
        context: Context | None = None,
        strip: Strip | None = None,
    ) -> Prompt:
        """Both views of a task, with this context, or else the one that is drawn for the step.

        Step 0 is for evaluations. With `strip` the messages are the teacher's already. Raises
        UserError if the messages have no place for the context, or contain control tokens that
        cannot be encoded as text.
        """
        context = self.contexts.draw(env, task, step) if context is None else context
        plain = plain_messages(task.messages)
        own, messages = self.views(plain, context, strip)
        student_text, student_ids = self.student.view(own, tools)
        teacher_text, teacher_ids = self.teacher.view(messages, tools)
        own_context_ids: tuple[int, ...] = ()
        if self.teacher is not self.student:
            _, own_context_ids = self.student.view(messages, tools)
        self._say("the context", context.text)
        self._say(f"task {task.id} of {env}", [*plain, *(tools or ())], "tasks")
        texts, ids = (student_text, teacher_text), (student_ids, teacher_ids)
        return Prompt(env, task, *texts, *ids, own_context_ids, context)

    def views(
        self, messages: list[dict[str, Any]], context: Context, strip: Strip | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages that the student reads, and those that the teacher reads."""
        if strip is None:
            return messages, self.with_context(messages, context.text)
        student = strip.student(messages, context.text)
        if not student:
            raise UserError(
                "without the part that is left out, a request has no message",
                where="orchestrator.env",
                fix="have the program send the task in a user message",
            )
        return student, messages

    def _say(self, place: str, data: Any, kind: str = "context") -> None:
        """Say once for each kind of place that it contains control tokens."""
        if kind in self._control_tokens_said or (kind == "context" and data == self._last_context):
            return
        if kind == "context":
            self._last_context = data
        if found := self.teacher.control_tokens_in(data):
            self._control_tokens_said.add(kind)
            allowed = self.student.settings.special_tokens_in_text == "allow"
            logger.info(
                f"{place} contains control tokens of the chat template ({', '.join(found)}): they "
                f"are encoded as {'control tokens' if allowed else 'text'} "
                "(model.special_tokens_in_text)"
            )

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The student's template's text, up to the beginning of the assistant's answer."""
        return self.student.render(messages, tools)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text, which already has the template's special tokens."""
        return self.student.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens and the end of its turn."""
        ids = list(ids)
        if ids and ids[-1] in self.end_of_turn_ids:  # not each tokenizer calls them special
            ids.pop()
        with tokenizer_code("decode a completion", self.student.where, EXIT_FAILED):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def with_context(self, messages: Sequence[Message], context: str) -> list[dict[str, Any]]:
        """A copy of the messages with the context in its place."""
        out = plain_messages(messages)
        if not context:
            return out
        indices = (i for i, message in enumerate(out) if message["role"] == self.placement)
        index = next(indices, None)
        if self.placement == "user":
            if index is None:
                raise UserError(
                    "a task has no user message to put the context before",
                    where="orchestrator.teacher_model.context_placement",
                    fix='use context_placement = "system"',
                )
            out[index]["content"] = context + (out[index].get("content") or "")
        elif index is None:
            out.insert(0, {"role": "system", "content": self.default_system + context})
        else:
            out[index]["content"] = (out[index].get("content") or "") + context
        return out

    @property
    def default_system(self) -> str:
        """The system message that the template adds if there is none; "" for most templates."""
        if self._default_system is None:
            self._default_system = self._probe_default_system()
        return self._default_system

    def _probe_default_system(self) -> str:
        user = {"role": "user", "content": "x"}
        bare = self.teacher.render([user])
        marked = self.teacher.render([{"role": "system", "content": MARK}, user])
        before, mark, after = marked.partition(MARK)
        if not mark:
            raise UserError(
                "the model's chat template drops system messages",
                where="orchestrator.teacher_model.context_placement",
                fix='use context_placement = "user"',
            )
        if bare.startswith(before) and bare.endswith(after) and len(bare) > len(before + after):
            return bare[len(before) : len(bare) - len(after)]
        return ""

    def boundary_warning(self, prompt: Prompt) -> str | None:
        """A warning if no white space separates the context from the text beside it, else None."""
        messages, context = plain_messages(prompt.task.messages), prompt.context.text
        content = next((m.get("content") for m in messages if m["role"] == self.placement), None)
        if self.placement == "user":
            left, right, which, verb = context, content or "", "the prompt", "end"
        elif content is None:
            left, right = self.default_system, context
            which, verb = "the chat template's own system message", "begin"
        else:
            left, right, which, verb = content, context, "the prompt's system message", "begin"
        boundary = left[-1:] + right[:1]
        if len(boundary) < 2 or boundary[0].isspace() or not boundary[1].isalnum():
            return None
        seam = left[-SEAM:] + right[:SEAM]
        return (
            f"no white space between the context and {which} ({seam!r}): "
            f"{verb} the context with an empty line or a space"
        )


def _own_template(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Whether the teacher's tokenizer has a chat template that renders unlike the student's."""
    if teacher.chat_template is None:
        logger.info("the teacher's tokenizer has no chat template: it reads the student's")
        return False
    return (teacher.chat_template, teacher.special_tokens_map) != (
        student.chat_template,
        student.special_tokens_map,
    )
