"""The interface of the displays, and what they show."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minidistill.types import Advance, Metrics


@dataclass(frozen=True, slots=True)
class Header:
    """What is shown once at the start; `rows` are (name, value) pairs."""

    title: str
    rows: tuple[tuple[str, str], ...]
    max_steps: int
    first_step: int
    directory: Path | None = None
    """The run's."""
    eval_interval: int | None = None
    """Steps between two evaluations, 0 for one at the end only; None: there is none."""
    history: tuple[Mapping[str, Any], ...] = ()
    """The records of the steps before `first_step`, as in `metrics.jsonl`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion, decoded token by token, with KL(student‖teacher) in nats for each.

    Of a conversation also with what the environment wrote, which has no KL.
    """

    tokens: tuple[str, ...]
    kl: tuple[float | None, ...]
    reward: float | None
    env: str


class Display(Protocol):
    """Shows a run. Safe to call from any thread.

    All text is untrusted: displays interpret no markup and pass no control characters through.
    """

    def open(self, header: Header) -> None:
        """Show the header; the first step is about to begin."""

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A part of a step with `total` units of work; yields the callable that advances it."""

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        """Show a finished optimizer step."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Show a finished evaluation, `eval/{env}/student/avg` and the like."""

    def baseline(self, metrics: Metrics) -> None:
        """Show the evaluation before step 1, `eval/{env}/baseline_student/avg` and the like."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A step's checkpoint is complete."""

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        """Show the result of the run."""

    def end(self, exit_code: int, directory: Path) -> None:
        """The run has ended without an error. All of its files are written."""

    def note(self, text: str, warning: bool = False) -> None:
        """Show a line of text; allowed before `open` and after `close`."""

    def close(self) -> None:
        """Restore the terminal. May be called more than once."""
