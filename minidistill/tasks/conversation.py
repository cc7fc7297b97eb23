"""A conversation as token ids: what the policy sampled, and between it what an environment wrote.

The ids of a later turn begin with those of the turn before, as sampled. What the chat template
writes between two answers is taken from the conversation rendered with a mark in the place of each
answer, so no answer is ever tokenized again. Where the template changes what it rendered before, or
the environment changes its messages, a new training sample begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from minidistill.envs.strip import Strip
from minidistill.errors import UserError
from minidistill.tasks.chat_template import MARK, ChatTemplate, tokenizer_code
from minidistill.tasks.messages import plain_messages
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Completion, Inserted, Message, Prompt, Role, Task, Turn


@dataclass(frozen=True, slots=True)
class Sample:
    """What is trained on: a prompt, and the turns that follow it."""

    prompt: Prompt
    completion: Completion
    text: str
    """The answers, and between them the messages that the environment wrote, with their roles."""


@dataclass(slots=True)
class _Open:
    """A sample that may get more turns."""

    prompt: Prompt
    around: tuple[list[str], list[str]]
    """What the template wrote around the answers, in the student's view and in the teacher's."""
    tools: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    inserted: list[Inserted] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.completions)

    def close(self) -> Sample:
        return Sample(self.prompt, _joined(self.completions, self.inserted), "".join(self.texts))


class Conversation:
    """One conversation, asked for a turn at a time."""

    def __init__(self, builder: PromptBuilder, prompt: Prompt, strip: Strip | None = None) -> None:
        """`prompt` is that of the task: the conversation begins with it as a rule, unless the
        student's view is made with `strip`."""
        self.builder, self.first, self.strip = builder, prompt, strip
        self.turns = 0
        self.full = False
        """It ended because its sample has no room for another turn."""
        self.text = ""
        """All answers, and between them the messages that the environment wrote."""
        self._closed: list[_Open] = []
        self._open: _Open | None = None
        self._messages: list[dict[str, Any]] = []
        self._answers: list[str] = []
        self._places: list[int] = []  # of the answers, among the messages
        self._next: tuple[tuple[int, ...], str] = (), ""  # ids to insert, and their messages

    @property
    def samples(self) -> list[Sample]:
        """Those with at least one turn. A later one begins where the one before could not be
        extended."""
        begun = [*self._closed, *([self._open] if self._open else [])]
        samples = [each.close() for each in begun if each.completions]
        if self.full and samples:
            last = samples.pop()
            samples.append(replace(last, completion=replace(last.completion, stop="length")))
        return samples

    def ask(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> None:
        """Take the messages that the next turn answers. Raises UserError as `PromptBuilder`, and
        for tools that the chat template does not show."""
        if self.extend(messages, tools):
            return
        if tools and not self.builder.student.takes_tools:
            raise UserError(
                "the model's chat template takes no tools",
                where=self.builder.student.where,
                fix="set model.chat_template to a file with one that does, or use no tools",
            )
        plain = plain_messages(messages)
        same = plain == plain_messages(self.first.task.messages)
        task = replace(self.first.task, messages=tuple(plain))
        usual = same and not tools and self.strip is None
        prompt = self.first if usual else self._built(task, tools)
        if self._open is not None:
            self._closed.append(self._open)
            self.text += _said(_after_answer(plain))
        self._open = _Open(prompt, ([prompt.student_text], [prompt.teacher_text]), [*tools])
        self._messages, self._answers, self._places = plain, [], []
        self._next = (), ""

    def extend(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> bool:
        """Take the messages if they extend the sample exactly. Returns whether they do."""
        plain = plain_messages(messages)
        extension = self._extension(plain, [*tools])
        if extension is None:
            return False
        self._places.append(len(self._messages))
        self._messages, self._next = plain, extension
        return True

    def forget(self, turn: Turn) -> bool:
        """Take an answer back, if it is the last of a sample. Returns whether it was."""
        for each in [*self._closed, *([self._open] if self._open else [])]:
            if each.turns and each.turns[-1] is turn:
                each.turns.pop()
                each.completions.pop()
                del each.texts[-2:]
                if each.inserted and each.inserted[-1].at == each.tokens:
                    each.inserted.pop()
                self.turns -= 1
                return True
        return False

    def _built(self, task: Task, tools: Sequence[Message]) -> Prompt:
        """A prompt of the same conversation, whose context stays what it was."""
        context, strip = self.first.context, self.strip
        return self.builder.build(self.first.env, task, tools, context=context, strip=strip)

    @property
    def ends_with_insertion(self) -> bool:
        """Whether the messages of the next turn extend the sample."""
        return bool(self._next[0])

    def length(self) -> int:
        """Tokens of the longest view of what the next turn reads."""
        assert self._open is not None
        prompt = self._open.prompt
        views = prompt.student_ids, prompt.teacher_ids, prompt.own_context_ids
        return max(map(len, views)) + len(self._after_prompt())

    def ids(self, role: Role, *, context: bool) -> tuple[int, ...]:
        """What a role reads before the next turn, with the context or without it."""
        assert self._open is not None
        return self._open.prompt.ids(role, context=context) + self._after_prompt()

    def take(self, completion: Completion, stop: Sequence[str] = ()) -> Turn:
        """Take the sampled turn. The text that its environment reads ends before a `stop`."""
        assert self._open is not None
        ids, messages = self._next
        prompt_tokens = len(self._open.prompt.student_ids) + len(self._after_prompt())
        if ids:
            self._open.inserted.append(Inserted(self._open.tokens, ids))
        text = self.builder.decode(completion.token_ids)
        self._open.completions.append(completion)
        self._open.texts += [messages, text]
        self.text += messages + text
        self._answers.append(text)
        self.turns += 1
        sampled = completion.token_ids, completion.logprobs
        turn = Turn(before_stop(text, stop), completion.truncated, *sampled, prompt_tokens)
        self._open.turns.append(turn)
        return turn

    def _after_prompt(self) -> tuple[int, ...]:
        assert self._open is not None
        return _joined(self._open.completions, self._open.inserted).sequence + self._next[0]

    def _extension(
        self, messages: list[dict[str, Any]], tools: list[Message]
    ) -> tuple[tuple[int, ...], str] | None:
        """The ids between the last answer and the next one, and the messages that they show.

        None if they do not extend the sample exactly.
        """
        if self._open is None or not self._open.completions or tools != self._open.tools:
            return None
        before = len(self._messages)
        answer = {"role": "assistant", "content": self._answers[-1]}
        if messages[: before + 1] != [*self._messages, answer]:
            return None
        last = self._open.completions[-1]
        if not self._decodes_to(last, self._answers[-1]):
            return None
        places = [*self._places, before]
        marked = [{**m, "content": MARK} if i in places else m for i, m in enumerate(messages)]
        template, context = self.builder.student, self.first.context
        marked_views = self.builder.views(marked, context, self.strip)
        views = self.builder.views(messages, context, self.strip)
        student, teacher = (
            self._around(each, marked_views[i], views[i], self._open.around[i])
            for i, each in enumerate((template, self.builder.teacher))
        )
        if student is None or teacher is None or student[-1] != teacher[-1]:
            return None
        ids = template.ids_after_mark(marked_views[0], tools)
        if ids is None:
            return None
        if last.token_ids[-1] == template.end_of_turn:
            if ids[:1] != last.token_ids[-1:]:
                return None
            ids = ids[1:]
        self._open.around = student, teacher
        return ids, _said(messages[before + 1 :])

    def _around(
        self,
        template: ChatTemplate,
        marked: Sequence[Message],
        messages: Sequence[Message],
        known: list[str],
    ) -> list[str] | None:
        """What a template writes around the answers; None if that or an answer has changed."""
        assert self._open is not None
        around = template.around_marks(marked, self._open.tools)
        if len(around) != len(self._answers) + 1 or around[:-1] != known:
            return None
        pairs = zip_longest(around, self._answers, fillvalue="")
        same = template.render(messages, self._open.tools) == "".join(
            part for pair in pairs for part in pair
        )
        return around if same else None

    def _decodes_to(self, completion: Completion, text: str) -> bool:
        """Whether an answer has no other control token than the end of its turn."""
        ids = list(completion.token_ids)
        if ids[-1] == self.builder.student.end_of_turn:
            ids.pop()
        with tokenizer_code("decode a completion", self.builder.student.where):
            return str(self.builder.tokenizer.decode(ids, skip_special_tokens=False)) == text


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the texts that end it."""
    return text[: min((text.find(each) for each in stop if each in text), default=len(text))]


def extends(builder: PromptBuilder, prompt: Prompt) -> bool:
    """Whether a second turn extends the first one, if answer and reply are a plain word."""
    conversation = Conversation(builder, prompt)
    messages = [*plain_messages(prompt.task.messages)]
    conversation.ask(messages)
    end = builder.student.end_of_turn
    ids = (*builder.encode("Yes"), *(() if end is None else (end,)))
    text = conversation.take(Completion(ids, (0.0,) * len(ids), "eos")).text
    answer, reply = {"role": "assistant", "content": text}, {"role": "user", "content": "Yes"}
    conversation.ask([*messages, answer, reply])
    return len(conversation.samples) == 1 and conversation.ends_with_insertion


def _after_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages after the last answer, all if there is none."""
    answers = (i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[max(answers, default=-1) + 1 :]


def _said(messages: Sequence[Message]) -> str:
    """An environment's messages, as a text between two answers."""
    return "".join(f"\n[{m['role']}] {m.get('content') or ''}\n" for m in messages)


def _joined(completions: Sequence[Completion], inserted: Sequence[Inserted]) -> Completion:
    """The turns of a sample as one completion."""
    starts = np.cumsum([0, *(len(c.token_ids) for c in completions)]).tolist()
    top_ids = [c.top_ids for c in completions if c.top_ids is not None]
    return Completion(
        token_ids=tuple(id for c in completions for id in c.token_ids),
        logprobs=tuple(p for c in completions for p in c.logprobs),
        stop=completions[-1].stop if completions else "length",
        top_ids=np.concatenate(top_ids) if top_ids else None,
        versions=tuple(
            (start + first, version)
            for start, c in zip(starts, completions, strict=False)
            for first, version in c.versions
        ),
        inserted=tuple(inserted),
    )
