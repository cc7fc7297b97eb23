"""The interface of an inference engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.trainer.policy import Policy
from minidistill.types import (
    Advance,
    Completion,
    Request,
    Role,
    SamplingParams,
    TeacherScores,
)

Ids = Sequence[int]
Sampled = tuple[int, Completion, TeacherScores | None]
"""A request's index, its completion, and the teacher's scores if the request asks for them."""
Finished = Callable[[int, Sequence[Sampled]], None]
"""Takes what ended in one step of an engine: the step's number, and the results by index."""


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine can do beyond sampling, and scoring completions at temperature 1."""

    scores_at_any_temperature: bool = False
    scores_ids: bool = False
    """It scores any ids at each position (`score_ids`), not only the completion's own tokens."""


class Engine(ABC):
    """Samples and scores completions with the weights of a role.

    The order of calls is `attach`, `wait_until_ready`, `sync`, and then any other.
    """

    name: str
    """What it is, for messages."""

    @property
    @abstractmethod
    def location(self) -> str:
        """Where it runs, for messages."""

    @property
    def description(self) -> str:
        """What it is and where it runs, for the run's header."""
        return f"{self.name} on {self.location}"

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities()

    @property
    def streams(self) -> bool:
        """Whether `generate` hands over completions while others are sampled, and leaves this
        process free meanwhile."""
        return False

    @property
    def ends_in_order(self) -> bool:
        """Whether the order in which completions are handed over depends on no timing."""
        return False

    @property
    def sleeps(self) -> bool:
        """Whether it shares the trainer's GPU, and so sleeps while the trainer computes."""
        return False

    @property
    def scores_while_sampling(self) -> bool:
        """Whether `generate` also scores the completions of requests with `teacher_ids`."""
        return False

    @property
    def score_counts(self) -> tuple[int, int]:
        """Sequences scored so far, and how many of them twice; (0, 0) if that is unknown."""
        return 0, 0

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:  # noqa: B027 - optional
        """Set the trainer's model, and the roles that this engine will serve."""

    def wait_until_ready(self) -> None:  # noqa: B027 - optional
        """Block until the engine can be called.

        Raises UserError (exit code 3) if it cannot start or cannot be reached.
        """

    def verify(self, trainer: Engine, temperature: float | None) -> None:  # noqa: B027 - optional
        """Check before training that the engine serves the same model as `trainer`.

        `temperature` is the sampling temperature, None if the engine only scores. Raises UserError
        (exit code 3) if the model is another, or log-probs are of another distribution.
        """

    @abstractmethod
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        """Sample a completion for each request, in the order of the requests.

        Log-probs are those of the distribution sampled from; greedy ones are taken at
        temperature 1. `advance` is called with numbers of finished completions. An engine that
        `streams` hands each completion to `finished`, from any thread; others ignore it.

        Raises UserError (exit code 4) if the model's logits are not finite, ValueError for
        `params.top_ids` without the capability `scores_ids` and for requests with `teacher_ids`
        without `scores_while_sampling`.
        """

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Log-probs (nats) of the completions' tokens, each completion after its prompt.

        Raises ValueError for a temperature other than 1 without the capability
        `scores_at_any_temperature`.
        """

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        """Log-probs (nats) of the given ids at each completion token, at temperature 1.

        `ids` holds an int array (tokens, k) for each completion; float32 arrays of the same shapes
        are returned. Raises ValueError without the capability `scores_ids`.
        """
        raise ValueError(f"{self.name} scores the completion's own tokens only")

    @abstractmethod
    def sync(self, version: int) -> None:
        """Take over the trainer's current weights; `version` names them."""

    def sleep(self) -> None:  # noqa: B027 - optional
        """Free the memory that the trainer needs; the next call takes it back."""

    def wake(self) -> None:  # noqa: B027 - optional
        """Take back the memory that `sleep` freed, before a call does."""

    def peak_memory(self) -> int | None:
        """The most bytes that any process of the engine has held so far; None if unknown."""
        return None

    def close(self) -> None:  # noqa: B027 - optional
        """Free everything. Calls in progress in other threads fail."""


def not_finite_error(engine: Engine, index: int) -> UserError:
    """The error of `Engine.generate` if the logits of a request are not finite."""
    return UserError(
        f"the model's logits are not finite, at rollout {index} in the {engine.description}",
        where="sampling",
        fix="lower trainer.optim.lr and start again, or resume an earlier checkpoint",
        exit_code=EXIT_HEALTH,
    )
