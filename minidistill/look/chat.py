"""A conversation with several who answer: each has its own answers in its history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minidistill.engines.checks import check_completion
from minidistill.errors import UserError
from minidistill.look.model import Model
from minidistill.look.views import View
from minidistill.seeding import stable_seed
from minidistill.tasks.conversation import Conversation
from minidistill.types import Completion, Context, Message, Request, SamplingParams, Task

NAME = "chat"
"""Of the environment that the prompts are made for."""
Show = Callable[[int, str], None]
"""Takes the number of a view and its answer so far."""


class _StoppedError(Exception):
    """The user has ended the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one view said."""

    text: str
    end: str
    """"eos", "length", or "stopped" by the user."""


class _Talk:
    """The conversation of one view."""

    def __init__(self, system: str) -> None:
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.conversation: Conversation | None = None


class Chat:
    """Asks each of the views the same questions. Their tokens are those of the run's templates."""

    def __init__(
        self, model: Model, views: Sequence[View], context: Context, params: SamplingParams
    ) -> None:
        """`context` is what the views in context read; it has no text if none is known."""
        self.model, self.views, self.context, self.params = model, views, context, params
        self.asked = 0
        self.reset()

    def reset(self, system: str = "") -> None:
        """Begin a new conversation, with a system message if it is not empty."""
        self._talks = [_Talk(system) for _ in self.views]

    def ask(
        self,
        question: str,
        show: Show = lambda view, text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """The answer of each view, in their order.

        `show` is called as answers grow. When `stopped` returns True after a token, that answer
        ends there. Raises UserError if the conversation is too long, or as the templates do.
        """
        self.asked += 1
        return [
            self._answer(number, question, lambda text, n=number: show(n, text), stopped)  # type: ignore[misc]
            for number in range(len(self.views))
        ]

    def _answer(
        self,
        number: int,
        question: str,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Answer:
        view, talk, builder = self.views[number], self._talks[number], self.model.builder
        messages = [*talk.messages, {"role": "user", "content": question}]
        if talk.conversation is None:
            task = Task(NAME, tuple(messages))
            prompt = builder.build(NAME, task, context=self.context)
            talk.conversation = Conversation(builder, prompt)
        talk.conversation.ask(messages)
        limit, length = self.model.placement.max_length, talk.conversation.length()
        if length >= limit:
            raise UserError(
                f"the conversation has {length} tokens, and the model takes {limit} with the "
                "answer",
                fix="/reset begins a new one",
            )
        params = SamplingParams(
            min(self.params.max_tokens, limit - length), self.params.temperature
        )
        ids = talk.conversation.ids(view.role, context=view.context)
        completion, was_stopped = self._sample(view, ids, params, show, stopped)
        text = talk.conversation.take(completion).text
        talk.messages = [*messages, {"role": "assistant", "content": text}]
        show(text)
        return Answer(text, "stopped" if was_stopped else completion.stop)

    def _sample(
        self,
        view: View,
        ids: tuple[int, ...],
        params: SamplingParams,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> tuple[Completion, bool]:
        """The completion, and whether it was stopped."""
        engine, ends = self.model.engine, self.model.policy.eos_ids
        sampled: list[int] = []

        def watch(tokens: list[int]) -> None:
            if sampled and sampled[-1] in ends:  # a GPU's rows leave the batch later
                return
            sampled.append(tokens[0])
            text = self.model.builder.decode(sampled)
            show(text.rstrip("\ufffd"))  # of a character whose other bytes are still to come
            if stopped() and tokens[0] not in ends:
                raise _StoppedError

        request = Request(ids, stable_seed(self.model.config.seed, NAME, self.asked))
        engine.watch = watch
        try:
            (completion,) = engine.generate([request], params, view.role)
        except _StoppedError:
            # log-probs are for training alone
            return Completion(tuple(sampled), (0.0,) * len(sampled), "length"), True
        finally:
            engine.watch = None
        check_completion(engine, completion, params, f"the answer of the {view.name}")
        return completion, False
