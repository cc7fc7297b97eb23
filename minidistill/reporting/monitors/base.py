"""The interface of a monitor: where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from minidistill.types import Metrics


class Monitor(Protocol):
    """Receives metrics under the names of `metrics.jsonl`."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Add metrics of a step; several calls for one step add up."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run, with the final scoreboard if there is one."""
