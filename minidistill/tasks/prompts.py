"""The two views of one prompt: the student's, and the teacher's with the context added.

Both go through the tokenizer's own chat template and differ by the context alone. The completion
is never tokenised again: its sampled ids are appended to either view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from minidistill.errors import UserError
from minidistill.types import Message, Prompt, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2063minidistill\u2063"  # stands in for a system message when a template is probed


class PromptBuilder:
    """Renders tasks for student and teacher.

    `placement` "user" puts the context in front of the first user message's text, "system" at the
    end of the system message, which is made where there is none (keeping the template's default).
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
        """Both views of a task. Raises UserError where the context has no place in its messages."""
        student = self.render(task.messages, tools)
        teacher = self.render(self.with_context(task.messages), tools)
        return Prompt(env, task, student, teacher, self.encode(student), self.encode(teacher))

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The chat template's text, up to where the assistant's answer begins."""
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                f"the model's chat template refuses messages of the roles {roles}: {error}",
                where="model.name",
                fix='use context_placement = "user", or an environment without such messages',
            ) from error
        return str(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text; the template wrote the special tokens already."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """A completion's text, without the special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def with_context(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The teacher's messages."""
        out = [dict(message) for message in messages]
        if not self.context:
            return out
        role = self.placement
        index = next((i for i, message in enumerate(out) if message["role"] == role), None)
        if role == "user":
            if index is None:
                raise UserError(
                    "a task has no user message to put the context in front of",
                    where="orchestrator.teacher_model.context_placement",
                    fix='use context_placement = "system"',
                )
            out[index]["content"] = _join(self.context, out[index]["content"])
        elif index is None:
            out.insert(0, {"role": "system", "content": self.default_system + self.context})
        else:
            out[index]["content"] = _join(out[index]["content"], self.context)
        return out

    @property
    def default_system(self) -> str:
        """The system message that the template adds by itself, "" for most templates."""
        if self._default_system is None:
            self._default_system = self._probe_default_system()
        return self._default_system

    def _probe_default_system(self) -> str:
        user = {"role": "user", "content": "x"}
        bare = self.render([user])
        marked = self.render([{"role": "system", "content": _MARK}, user])
        before, found, after = marked.partition(_MARK)
        if not found:
            raise UserError(
                "the model's chat template drops system messages",
                where="orchestrator.teacher_model.context_placement",
                fix='use context_placement = "user"',
            )
        if bare.startswith(before) and bare.endswith(after) and len(bare) > len(before + after):
            return bare[len(before) : len(bare) - len(after)]
        return ""

    def joint_warning(self, prompt: Prompt) -> str | None:
        """A warning where the context runs into the prompt's text without white space."""
        messages = prompt.task.messages
        beside = next((m["content"] for m in messages if m["role"] == self.placement), None)
        if self.placement == "user":
            left, right = self.context, _edge(beside, 0)
        else:
            left, right = self.default_system if beside is None else _edge(beside, -1), self.context
        joint = left[-1:] + right[:1]
        if len(joint) < 2 or joint[0].isspace() or not joint[1].isalnum():
            return None
        return f"the context runs into the text beside it ({joint!r}): put white space between them"


def _join(first: Any, second: Any) -> Any:
    """Two contents in a row, where one may be a list of typed parts."""
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    return [*_parts(first), *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _edge(content: Any, end: int) -> str:
    """The text at the beginning (0) or end (-1) of a content, "" where there is none."""
    parts = _parts(content or "")
    return parts[end].get("text", "") if parts else ""
