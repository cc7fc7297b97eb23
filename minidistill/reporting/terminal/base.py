"""What a run shows, and the interface of what shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from minidistill.types import Metrics

Advance = Callable[[int], None]
"""Called with the number of units done since the last call."""


@dataclass(frozen=True, slots=True)
class Header:
    """What is said once at the start; `rows` are (name, value) pairs."""

    title: str
    rows: tuple[tuple[str, str], ...]
    max_steps: int
    first_step: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion, decoded token by token, with KL(student‖teacher) in nats for each."""

    tokens: tuple[str, ...]
    kl: tuple[float, ...]
    reward: float | None
    env: str


class Display(Protocol):
    """Where a run reports to. Every text is data: no markup, no control characters get through."""

    def open(self, header: Header) -> None:
        """Show the header; the first step is about to begin."""

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A part of a step with `total` units of work; yields the callable that advances it."""

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        """An optimizer step is done."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """An evaluation is done: `eval/{env}/student/avg` and the like."""

    def baseline(self, metrics: Metrics) -> None:
        """The evaluation before step 1: `eval/{env}/baseline_student/avg` and the like."""

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        """The result of the run."""

    def note(self, text: str, warning: bool = False) -> None:
        """A line worth reading; allowed before `open` and after `close`."""

    def close(self) -> None:
        """Leave the terminal as it was. May be called more than once."""
