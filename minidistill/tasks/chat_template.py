"""A tokenizer's chat template: what it reads, how it renders, and which token ends a turn."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
from jinja2 import TemplateError, nodes
from jinja2.sandbox import SandboxedEnvironment

from minidistill.errors import EXIT_USAGE, UserError
from minidistill.system.foreign import describe, foreign_code
from minidistill.tasks.control_tokens import ControlTokens
from minidistill.tasks.messages import plain_messages
from minidistill.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LARGEST_SOURCE = 200_000
"""Characters of a template."""
LONGEST_TEXT = 4_000_000
"""Characters of a rendered text: millions of tokens."""
MARK = "\u2063minidistill\u2063"  # a message that no template contains, for probing
_SURROGATE = re.compile("[\ud800-\udfff]")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own
# Before a template, in place of transformers' function of this name. The newline is trimmed.
_FIXED_DATES = "{% macro strftime_now(format) %}{{ fixed_dates[format] }}{% endmacro %}\n"
_USER = {"role": "user", "content": "x"}
_ANSWER = {"role": "assistant", "content": MARK}
# What `apply_chat_template` is called with, or takes for itself
_RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "strftime_now"),
    "fixed_dates",
    *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    "return_assistant_tokens_mask",
}


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """How chat templates are used in a run."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """`model.chat_template_kwargs`."""
    now: datetime | None = None
    """What templates take for the present; None is the clock."""
    special_tokens_in_text: str = "text"


class ChatTemplate:
    """Renders messages with a tokenizer's chat template, and encodes what it rendered."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TemplateSettings,
        where: str = "model.name",
    ) -> None:
        """`where` is the setting that names the model, for messages.

        Raises UserError if there is no template, or if it is not valid.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "the model's tokenizer has no chat template",
                where=where,
                fix="set model.chat_template to a file with one, or use an instruction-tuned model",
            )
        self.tokenizer, self.settings, self.where = tokenizer, settings, where
        tree = self._parse()
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        """The names that the template reads."""
        self.dates = {} if settings.now is None else _dates(tree, settings.now)
        """What it writes for each format of the date or the time: fixed, if there is one."""

    # -- rendering and encoding ----------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The template's text, up to the beginning of the assistant's answer by default."""
        tools = list(tools) if tools else None
        arguments = dict(self.settings.arguments)
        if self.dates:
            source = self.tokenizer.get_chat_template(tools=tools)
            arguments |= {"chat_template": _FIXED_DATES + source, "fixed_dates": self.dates}

        def failure(error: BaseException) -> UserError:
            roles = ", ".join(str(message["role"]) for message in messages)
            if isinstance(error, TemplateError):
                what = f"rejects messages with the roles {roles}: {error}"
                fix = 'use context_placement = "user", or an environment without these roles'
            else:
                what = f"fails on messages with the roles {roles}: {describe(error)}"
                fix = "set model.chat_template to a file with another"
            return UserError(f"the model's chat template {what}", where=self.where, fix=fix)

        with foreign_code(failure):
            return str(
                self.tokenizer.apply_chat_template(
                    plain_messages(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **arguments,
                )
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text, which already has the template's special tokens."""
        if len(text) > LONGEST_TEXT:
            raise UserError(
                f"the chat template makes a text of {len(text)} characters",
                where=self.where,
                fix="set model.chat_template to a file with another",
            )
        if surrogate := _SURROGATE.search(text):
            raise UserError(
                f"a prompt has a lone surrogate ({surrogate[0]!r}), which is no character",
                where=self.where,
                fix="take it out of the chat template, the context or the environment's messages",
            )
        # a tokenizer may be set to encode all control tokens as text, the template's own too
        split = getattr(self.tokenizer, "split_special_tokens", False)
        options = {"split_special_tokens": False} if split else {}
        with tokenizer_code("encode a prompt", self.where):
            return tuple(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def view(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, tuple[int, ...]]:
        """The text of a prompt, and its token ids.

        Control tokens in the messages and tools are encoded as text, unless the settings allow
        them. Raises UserError if that cannot be done.
        """
        text = self.render(messages, tools)
        found = self.control_tokens_in([*messages, *(tools or ())])
        if not found or self.settings.special_tokens_in_text == "allow":
            return text, self.encode(text)
        control = self._control_tokens
        hidden = self.render(control.hidden(messages), tools and control.hidden(tools))
        return text, control.encode(text, hidden, found)

    def control_tokens_in(self, data: Any) -> list[str]:
        """The control tokens in the texts of `data`: messages, tools, or a string."""
        return self._control_tokens.within(data)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        """The tokenizer's special tokens, and others that the template writes around turns."""
        tokens = self._added_tokens
        flagged = {id for id, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        dialog = self._try_to_render([_USER, _ANSWER, _USER]) or self._try_to_render([_USER])
        control = flagged.union(self.tokenizer.all_special_ids, self.encode(dialog))
        texts = [text for id, text in tokens.items() if id in control]
        return ControlTokens(self.tokenizer, texts, self.encode)

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        """Their texts, by id."""
        special = zip(
            self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True
        )
        return {id: t.content for id, t in self.tokenizer.added_tokens_decoder.items()} | dict(
            special
        )

    # -- turns ---------------------------------------------------------------------------------

    def generation_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids that the template adds to `messages` to begin the assistant's turn.

        What it writes without them need not be the beginning of what it writes with them: some
        templates then close the conversation.
        """
        opened = self.encode(self.render(messages))
        closed = self.encode(self.render(messages, add_generation_prompt=False))
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(opened, closed, strict=False))
        return opened[len(list(equal)) :]

    def unopened_turn(self, messages: Sequence[Message]) -> str:
        """What the template writes before an answer but not at the end of a prompt, "" if nothing.

        It is empty too if the template adds a generation prompt, whatever that is.
        """
        prompt = self.render(messages)
        if prompt != self.render(messages, add_generation_prompt=False):
            return ""
        before, mark, _ = self._try_to_render([*messages, _ANSWER]).rpartition(MARK)
        return before[len(prompt) :].strip() if mark and before.startswith(prompt) else ""

    @property
    def takes_tools(self) -> bool:
        """Whether the template shows tools, or the tokenizer has another one that does."""
        named = self.tokenizer.chat_template
        return "tools" in self.variables or (isinstance(named, dict) and "tool_use" in named)

    def around_marks(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[str]:
        """What the template writes before, between and after the contents that are `MARK`."""
        return self.render(messages, tools).split(MARK)

    def ids_after_mark(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[int, ...] | None:
        """Token ids of what the template writes after the last content that is `MARK`.

        Control tokens in the messages are encoded as in `view`. None if the tokenizer joins the end
        of an answer with what follows.
        """
        before = "x"  # so that this is encoded as the middle of a text
        text = before + self.around_marks(messages, tools)[-1]
        found = self.control_tokens_in([*messages, *(tools or ())])
        if found and self.settings.special_tokens_in_text != "allow":
            data = (
                self._control_tokens.hidden(messages),
                tools and self._control_tokens.hidden(tools),
            )
            hidden = before + self.around_marks(*data)[-1]
            ids = self._control_tokens.encode(text, hidden, found)
        else:
            ids = self.encode(text)
        start = self.encode(before)
        return ids[len(start) :] if ids[: len(start)] == start else None

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends an assistant's turn, as the template writes it; None if it has none.

        It is the first control token after an answer, or after one that another turn follows.
        """
        for after in ([], [_USER]):
            _, mark, ending = self._try_to_render([_USER, _ANSWER, *after]).rpartition(MARK)
            ids = self.encode(ending) if mark else ()
            end = next((id for id in ids if id in self._added_tokens), None)
            if end is not None:
                return end
        return None

    @cached_property
    def shows_turns(self) -> bool:
        """Whether the template renders an assistant's answer, so that its end can be seen."""
        return MARK in self._try_to_render([_USER, _ANSWER])

    def _try_to_render(self, messages: Sequence[Message]) -> str:
        """A conversation without a generation prompt; "" if the template rejects it."""
        try:
            return self.render(messages, add_generation_prompt=False)
        except UserError:
            return ""

    # -- the template --------------------------------------------------------------------------

    def _parse(self) -> nodes.Template:
        try:
            source = self.tokenizer.get_chat_template()
            if len(source) > LARGEST_SOURCE:
                raise TemplateError(f"it has {len(source)} characters")
            environment = _Unfolded(extensions=["jinja2.ext.loopcontrols"])
            tree = environment.parse(_GENERATION.sub("", source))
            jinja2.meta.find_undeclared_variables(tree)  # notices unknown filters and tests
            return tree
        except (TemplateError, RecursionError, TypeError) as error:  # a number in its place
            line = f", line {line}" if (line := getattr(error, "lineno", None)) else ""
            raise UserError(
                f"the chat template is not valid{line}: {error}",
                where=self.where,
                fix="correct it, or set model.chat_template to a file with another",
            ) from error
        except ValueError as error:  # several templates, and none is the default
            raise UserError(
                f"the tokenizer names no default chat template: {error}",
                where=self.where,
                fix="set model.chat_template to a file with the one to use",
            ) from error


class _Unfolded(SandboxedEnvironment):
    """Computes nothing of a template that is only read: `"a" * 10 ** 9` would take long."""

    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)


def _dates(tree: nodes.Template, now: datetime) -> dict[str, str]:
    """What `strftime_now` returns for each format in a template, at the time `now`.

    It is empty, with a warning, if the formats cannot be read from the template.
    """
    names = [n for n in tree.find_all(nodes.Name) if n.name == "strftime_now"]
    tests = [t for t in tree.find_all(nodes.Test) if t.node in names]
    calls = [c for c in tree.find_all(nodes.Call) if c.node in names]
    try:
        formats = [c.args[0].as_const() for c in calls]
    except (nodes.Impossible, IndexError):
        formats = []
    if len(formats) + len(tests) != len(names):
        logger.warning(
            "the chat template writes the date in a way that cannot be fixed for the run: on "
            "another day the run cannot be resumed"
        )
        return {}
    return {format: now.strftime(format) for format in formats}


def tokenizer_code(
    doing: str, where: str, exit_code: int = EXIT_USAGE
) -> AbstractContextManager[None]:
    """Call a tokenizer, whose code may be the model's own. `doing` is what it cannot do then."""
    return foreign_code(
        lambda error: UserError(
            f"the model's tokenizer cannot {doing}: {describe(error)}",
            where=where,
            fix="use the tokenizer that was made for the model; --traceback shows where it failed",
            exit_code=exit_code,
        )
    )


def check_arguments(templates: Sequence[ChatTemplate]) -> None:
    """Raise UserError for a `model.chat_template_kwargs` that no template reads.

    It would change nothing, which is not what somebody who sets it expects.
    """
    read = frozenset[str]().union(*(template.variables for template in templates))
    for name in templates[0].settings.arguments:
        where = f"model.chat_template_kwargs.{name}"
        if name in _RESERVED:
            raise UserError(f"{name} is set by the run", where=where, fix=f"remove {name}")
        if name not in read:
            names = ", ".join(sorted(read - _RESERVED)) or "nothing but messages"
            raise UserError(
                f"the chat template does not read {name}, so it would change nothing",
                where=where,
                fix=f"remove it, or use what the template reads: {names}",
            )
