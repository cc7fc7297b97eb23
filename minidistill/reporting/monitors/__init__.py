"""Monitors receive metrics besides `metrics.jsonl`. Their packages are imported when needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidistill.reporting.monitors.base import Monitor, Sample
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

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        for monitor in self._monitors if rows else ():
            monitor.samples(step, rows)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for monitor in self._monitors:
            monitor.close(summary)


def check_monitors(config: Config) -> None:
    """Raise UserError (exit code 3) if a monitor that `config` asks for cannot work.

    Its package is missing or fails, or it has no credentials. No network is needed for that.
    """
    if config.wandb is not None:
        from minidistill.reporting.monitors import weights_and_biases

        weights_and_biases.check(config.wandb)
    if config.tensorboard is not None:
        from minidistill.reporting.monitors import tensorboard_events

        tensorboard_events.check()
    if config.trackio is not None:
        from minidistill.reporting.monitors import trackio_project

        trackio_project.check()


def open_monitors(config: Config, run_dir: Path, first_step: int = 1) -> Monitor:
    """The monitors that `config` asks for, which `check_monitors` has checked.

    The run begins or goes on at `first_step`. Every failure of a monitor is a warning. The result's
    `log` and `samples` never wait, and its `close` waits a few seconds at most.
    """
    from minidistill.reporting.monitors.background import BackgroundMonitor

    monitors: list[Monitor] = []
    for name, connect in _chosen(config, run_dir, first_step).items():
        try:
            monitors.append(BackgroundMonitor(name, connect))
        except RuntimeError as error:  # no more threads
            logger.warning(f"{name} is off: {error}; the run and metrics.jsonl are unaffected")
    return _Monitors(monitors)


def _chosen(config: Config, run_dir: Path, first_step: int) -> dict[str, Callable[[], Monitor]]:
    """How to open each monitor, by its name. Packages are imported when that is called."""

    def wandb() -> Monitor:
        from minidistill.reporting.monitors.weights_and_biases import Wandb

        return Wandb(config, run_dir)

    def tensorboard() -> Monitor:
        from minidistill.reporting.monitors.tensorboard_events import TensorBoard

        return TensorBoard(config, run_dir, first_step)

    def trackio() -> Monitor:
        from minidistill.reporting.monitors.trackio_project import Trackio

        return Trackio(config, run_dir)

    chosen: dict[str, Callable[[], Monitor]] = {}
    if config.wandb is not None:
        chosen["W&B"] = wandb
    if config.tensorboard is not None:
        chosen["TensorBoard"] = tensorboard
    if config.trackio is not None:
        chosen["trackio"] = trackio
    return chosen
