"""The interface of a monitor: where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from minidistill.errors import printable
from minidistill.types import Metrics

Sample = Mapping[str, Any]
COLUMNS = {"prompt": "prompt", "before": "before", "teacher": "in context", "after": "after"}
"""What is shown of a sample, and under which name."""


def table(rows: Sequence[Sample]) -> tuple[list[Any], list[list[str]]]:
    """The names of the columns that the samples have, and a text for each of them."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    texts = [[printable(str(row.get(key, ""))) for key in keys] for row in rows]
    return [COLUMNS[key] for key in keys], texts


def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested values under names with slashes, as the metrics have; None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}/{key}")
        elif value is not None:
            yield f"{prefix}/{key}", value


class Monitor(Protocol):
    """Receives metrics under the names of `metrics.jsonl`."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Add metrics of a step; several calls for one step add up."""

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Add answers to held-out prompts: `env`, `task_id`, `prompt`, and the texts `before`
        training, of the `teacher` with the context, and, of a trained student, `after`."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, with the final scoreboard if there is one."""
