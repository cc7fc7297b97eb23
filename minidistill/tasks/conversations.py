"""The conversations that a program leads in one episode, each request of which may go on with any
of them."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.envs.strip import Strip
from minidistill.tasks.conversation import Conversation, Sample
from minidistill.tasks.messages import plain_messages
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Completion, Message, Prompt, Role, Turn


class Conversations:
    """Takes requests in the place of one `Conversation`.

    A request that extends one of the samples so far, token for token, goes on with the last one
    that it extends. Any other begins a sample.
    """

    def __init__(self, builder: PromptBuilder, prompt: Prompt, strip: Strip | None) -> None:
        self.builder, self.first, self.strip = builder, prompt, strip
        self.turns = 0
        self.asked = self.whole = 0
        """Requests, and those that had nothing to leave out with `strip`."""
        self._all: list[Conversation] = []
        self._now: Conversation | None = None

    @property
    def full(self) -> bool:
        """Whether there is no room in any sample. A request can always begin another."""
        return False

    @full.setter
    def full(self, value: bool) -> None:
        """No room is left in the sample of the request that was taken."""
        assert self._now is not None
        self._now.full = value

    @property
    def samples(self) -> list[Sample]:
        return [sample for each in self._all for sample in each.samples]

    @property
    def text(self) -> str:
        """See `Conversation.text`."""
        return "\n\n".join(each.text for each in self._all)

    def ask(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> None:
        """See `Conversation.ask`."""
        self._now = next(
            (each for each in reversed(self._all) if each.extend(messages, tools)), None
        )
        if self._now is None:
            self._now = Conversation(self.builder, self.first, self.strip)
            self._now.ask(messages, tools)
            self._all.append(self._now)
        self.asked += 1
        if self.strip is not None:
            plain = plain_messages(messages)
            self.whole += self.strip.student(plain, self.first.context.text) == plain

    def length(self) -> int:
        assert self._now is not None
        return self._now.length()

    def ids(self, role: Role, *, context: bool) -> tuple[int, ...]:
        assert self._now is not None
        return self._now.ids(role, context=context)

    def take(self, completion: Completion, stop: Sequence[str] = ()) -> Turn:
        assert self._now is not None
        self.turns += 1
        return self._now.take(completion, stop)

    def forget(self, turn: Turn) -> bool:
        """See `Conversation.forget`. The numbers of later turns do not change."""
        return any(each.forget(turn) for each in self._all)
