"""Monitors receive metrics besides `metrics.jsonl`. Their packages are imported when needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidistill.reporting.monitors.base import Monitor
from minidistill.types import Metrics

if TYPE_CHECKING:
    from minidistill.config import Config

logger = logging.getLogger(__name__)

__all__ = ["Monitor", "check_monitors", "open_monitors"]


class _Monitors:
    """All monitors that are on; there may be none."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = tuple(monitors)

    def log(self, step: int, metrics: Metrics) -> None:
        for monitor in self._monitors:
            monitor.log(step, metrics)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for monitor in self._monitors:
            monitor.close(summary)


def check_monitors(config: Config) -> None:
    """Raise UserError (exit code 3) if a monitor that `config` asks for cannot work.

    Its package is missing or fails, or it has no credentials. No network is needed for that.
    """
    if config.wandb is not None:
        from minidistill.reporting.monitors.weights_and_biases import check

        check(config.wandb)


def open_monitors(config: Config, run_dir: Path) -> Monitor:
    """The monitors that `config` asks for, which `check_monitors` has checked.

    Every failure of a monitor is a warning. The result's `log` never waits, and its `close` waits a
    few seconds at most.
    """
    monitors: list[Monitor] = []
    if config.wandb is not None:
        from minidistill.reporting.monitors.background import BackgroundMonitor
        from minidistill.reporting.monitors.weights_and_biases import Wandb

        try:
            monitors.append(BackgroundMonitor("W&B", lambda: Wandb(config, run_dir)))
        except RuntimeError as error:  # no more threads
            logger.warning(f"W&B is off: {error}; the run and metrics.jsonl are unaffected")
    return _Monitors(monitors)
