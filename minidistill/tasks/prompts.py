"""The two views of a prompt: the student's, and the teacher's with the context added.

Both are rendered with the tokenizer's chat template and differ in the context alone. A completion
is never tokenized again: its sampled ids are appended to either view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from minidistill.errors import UserError
from minidistill.tasks.messages import plain_messages
from minidistill.types import Message, Prompt, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2063minidistill\u2063"  # a system message that no template contains, for probing


class PromptBuilder:
    """Renders tasks for student and teacher.

    `placement` "user" puts the context before the text of the first user message. "system" puts it
    at the end of the system message; if there is none, one is added that begins with the template's
    default system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: str, placement: str) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the model's tokenizer has no chat template",
                where="model.name",
                fix="use an instruction-tuned model, or add a chat_template to its tokenizer",
            )
        self.tokenizer, self.context, self.placement = tokenizer, context, placement
        self._default_system: str | None = None

    def build(self, env: str, task: Task, tools: Sequence[Any] | None = None) -> Prompt:
        """Both views of a task. Raises UserError if its messages have no place for the context."""
        student = self.render(task.messages, tools)
        teacher = self.render(self.with_context(task.messages), tools)
        return Prompt(env, task, student, teacher, self.encode(student), self.encode(teacher))

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The chat template's text, up to the beginning of the assistant's answer."""
        try:
            text = self.tokenizer.apply_chat_template(
                plain_messages(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                f"the model's chat template rejects messages with the roles {roles}: {error}",
                where="model.name",
                fix='use context_placement = "user", or an environment without these roles',
            ) from error
        return str(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text, which already has the template's special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def with_context(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """A copy of the messages with the context in its place."""
        out = plain_messages(messages)
        if not self.context:
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
            out[index]["content"] = self.context + (out[index].get("content") or "")
        elif index is None:
            out.insert(0, {"role": "system", "content": self.default_system + self.context})
        else:
            out[index]["content"] = (out[index].get("content") or "") + self.context
        return out

    @property
    def default_system(self) -> str:
        """The system message that the template adds if there is none; "" for most templates."""
        if self._default_system is None:
            self._default_system = self._probe_default_system()
        return self._default_system

    def _probe_default_system(self) -> str:
        user = {"role": "user", "content": "x"}
        bare = self.render([user])
        marked = self.render([{"role": "system", "content": _MARK}, user])
        before, mark, after = marked.partition(_MARK)
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
        messages = plain_messages(prompt.task.messages)
        content = next((m.get("content") for m in messages if m["role"] == self.placement), None)
        if self.placement == "user":
            left, right = self.context, content or ""
        elif content is None:
            left, right = self.default_system, self.context
        else:
            left, right = content, self.context
        boundary = left[-1:] + right[:1]
        if len(boundary) < 2 or boundary[0].isspace() or not boundary[1].isalnum():
            return None
        return f"no white space between the context and the text beside it ({boundary!r}): add some"
