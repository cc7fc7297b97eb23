"""An engine that hands over known completions in a given order, when a test lets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from minidistill.engines.base import Engine, Finished, Ids
from minidistill.types import Advance, Completion, Request, Role, SamplingParams


class ScriptedEngine(Engine):
    """Samples with another engine, and hands over from a thread that may be the only other one.

    `order` gives the order in which completions end. Before the one at position `held` ends, it
    waits for `release`.
    """

    name = "scripted"
    location = "a thread"
    streams = True
    ends_in_order = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.order: Callable[[int], Sequence[int]] = range
        self.held: int | None = None
        self.release = threading.Event()
        self.error: Exception | None = None
        """Raised at position `held` instead of waiting."""
        self.known: dict[tuple[Request, ...], list[Completion]] = {}
        self.scored: list[int] = []
        """The number of sequences of each call of `score`."""

    def prepare(self, requests: Sequence[Request], params: SamplingParams) -> None:
        """Sample these now: the trainer's weights cannot be used while it trains."""
        self.known[tuple(requests)] = self.engine.generate(requests, params, Role.STUDENT)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        completions = self.known[tuple(requests)]
        for position, index in enumerate(self.order(len(requests))):
            if position == self.held:
                if self.error is not None:
                    raise self.error
                assert self.release.wait(60), "nobody released the sampling"
            if advance is not None:
                advance(1)
            if finished is not None:
                finished(position, [(index, completions[index], None)])
        return completions

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        self.scored.append(len(prompts))
        return [
            [-0.5 * len(p) - token for token in c]
            for p, c in zip(prompts, completions, strict=True)
        ]

    def sync(self, version: int) -> None:
        """Nothing to do."""

    def close(self) -> Any:
        self.release.set()
