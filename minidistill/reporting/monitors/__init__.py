"""Where metrics go beside `metrics.jsonl`. What is heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minidistill.types import Metrics

if TYPE_CHECKING:
    from minidistill.config import Config

__all__ = ["Monitor", "check_monitors", "open_monitors"]


class Monitor(Protocol):
    """Takes metrics under the names given. Never raises and never waits, `close` apart."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step; several calls for one step add up."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The end, with the final scoreboard where there is one. Waits a few seconds at most."""


class _Monitors:
    """All of the monitors that are on, none included."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = tuple(monitors)

    def log(self, step: int, metrics: Metrics) -> None:
        for monitor in self._monitors:
            monitor.log(step, metrics)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for monitor in self._monitors:
            monitor.close(summary)


def check_monitors(config: Config) -> None:
    """Raise UserError (exit code 3) where a package that `config` asks for is missing."""
    if config.wandb is not None:
        from minidistill.reporting.monitors.weights_and_biases import require

        require()


def open_monitors(config: Config, run_dir: Path, warn: Callable[[str], None]) -> Monitor:
    """The monitors that `config` asks for. `warn` is called from the thread that calls `log`.

    Raises as `check_monitors` does; all else that goes wrong with a monitor is a warning.
    """
    check_monitors(config)
    monitors: list[Monitor] = []
    if config.wandb is not None:
        from minidistill.reporting.monitors.background import Background
        from minidistill.reporting.monitors.weights_and_biases import Wandb

        monitors.append(Background("W&B", lambda: Wandb(config, run_dir), warn))
    return _Monitors(monitors)
