"""A step's rollouts, which may arrive in parts, its result, and the commands to other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from torch import Tensor

from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.types import Advance, Metrics, Rollout, TokenFigures

Count = Callable[[Sequence[TokenFigures]], int]
"""What is reported as progress: the number of trained rollouts, or of their tokens."""


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """A step's rollouts, in parts that may still be sampled when the step begins."""

    parts: Iterable[Sequence[Rollout]]
    """In a fixed order. Each is divided into micro-batches by itself."""
    teacher_prompts: Sequence[tuple[int, ...]]
    """Ids of all the prompts if the trainer runs the teacher; empty if an engine scored it."""
    tokens: int
    """Completion tokens of all the parts, or an upper bound if they are still sampled."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> StepRollouts:
        """One part that is complete."""
        scored = any(r.teacher is not None for r in rollouts)
        prompts = [] if scored else [r.prompt.teacher_ids for r in rollouts]
        return cls([rollouts], prompts, sum(len(r.completion.token_ids) for r in rollouts))


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's metrics, its rollouts, and the per-token figures of each rollout in order."""

    metrics: Metrics
    tokens: list[TokenFigures]
    rollouts: list[Rollout]


def token_count(figures: Sequence[TokenFigures]) -> int:
    return sum(len(f.loss) for f in figures)


class ReceivedParts:
    """The parts of a step, as the driver gets them and sends them to the other ranks.

    They are kept, and iterating again begins with the first.
    """

    def __init__(self, rank_group: RankGroup, parts: Iterator[Sequence[Rollout]]) -> None:
        """The other ranks' own `parts` are empty."""
        self.parts: list[Sequence[Rollout]] = []
        self.waited = 0.0
        """Seconds that the driver waited for them."""
        self._rank_group, self._next, self._complete = rank_group, parts, False

    def __iter__(self) -> Iterator[Sequence[Rollout]]:
        for index in count():
            if index == len(self.parts) and not self._complete:
                began = time.perf_counter()
                with self._rank_group.paused():
                    part = next(self._next, None)
                self.waited += time.perf_counter() - began
                part = self._rank_group.broadcast_object(part)
                if part is None:
                    self._complete = True
                else:
                    self.parts.append(part)
            if index == len(self.parts):
                return
            yield self.parts[index]


class RankTrainer(Protocol):
    """What the commands below need of a rank's trainer."""

    def take_step(
        self,
        command: TrainStep,
        parts: Iterator[Sequence[Rollout]],
        advance: Advance,
        count: Count,
    ) -> StepResult: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Command: take part in a step."""

    step: int
    tokens: int
    """See `StepRollouts`."""
    prefix: tuple[int, ...]
    """That all of the step's teacher prompts begin with, if the trainer runs the teacher."""

    def run(self, trainer: RankTrainer) -> None:
        trainer.take_step(self, iter(()), lambda count: None, len)


@dataclass(frozen=True, slots=True)
class GatherState:
    """Command: take part in gathering what a checkpoint holds."""

    def run(self, trainer: RankTrainer) -> None:
        trainer.state()


@dataclass(frozen=True, slots=True)
class LoadState:
    """Command: receive a checkpoint's tensors from the driver."""

    shapes: dict[str, Tensor]
    """Tensors without data."""

    def run(self, trainer: RankTrainer) -> None:
        trainer.load_state(self.shapes)
