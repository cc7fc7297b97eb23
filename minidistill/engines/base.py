"""The one interface that the loop needs of an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from minidistill.types import Completion

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. Its seed alone, not its neighbours, decides what is drawn."""

    prompt_ids: tuple[int, ...]
    seed: int


class Engine(Protocol):
    """Samples with the student's adapter or the frozen base, and scores given tokens."""

    @property
    def description(self) -> str:
        """What it is and where it runs, for the run's header."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        student: bool,
        advance: Advance | None = None,
    ) -> list[Completion]:
        """A completion for each request, in order. `temperature` 0 is greedy.

        Log-probs are those of the distribution sampled from; greedy ones are taken at
        temperature 1. `advance` is told of finished completions.
        """
        ...

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float,
        student: bool,
    ) -> list[list[float]]:
        """Log-probs (nats) of given completion tokens after their prompts."""
        ...

    def sync(self, version: int) -> None:
        """Take over the trainer's weights; `version` names them."""
        ...

    def sleep(self) -> None:
        """Free what sampling needs while the trainer works."""
        ...

    def close(self) -> None: ...
