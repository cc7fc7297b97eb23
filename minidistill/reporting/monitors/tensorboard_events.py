"""TensorBoard, for a configuration with a `[tensorboard]` table. The package is optional."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.reporting.monitors.base import Sample, flat, table
from minidistill.reporting.monitors.packages import answer_in_time, require
from minidistill.types import Metrics

FOLDER = "tensorboard"
"""Of the event files, in a run's directory."""


def check() -> None:
    """Raise UserError (exit code 3) unless the package is installed and can be imported."""
    require("tensorboard", "tensorboard")
    answer_in_time("tensorboard", _can_be_imported, "or run with --no-tensorboard")


def _can_be_imported() -> bool:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter is not None


class TensorBoard:
    """The event files of one run, in `run_dir/tensorboard`. A resumed run adds another file."""

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        """A run that begins or goes on at `first_step` repeats what was logged from there on."""
        from torch.utils.tensorboard import SummaryWriter

        assert config.tensorboard is not None
        self._writer: Any = SummaryWriter(
            log_dir=str(run_dir / FOLDER),
            purge_step=first_step if first_step > 1 else 0,  # step 0 is the baseline
            flush_secs=max(1, math.ceil(config.tensorboard.flush_seconds)),
        )
        settings = json.dumps(config.model_dump(mode="json"), indent=2)
        self._writer.add_text("config", _block(settings), max(0, first_step - 1))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        columns, texts = table(rows)
        for number, row in enumerate(texts):
            parts = [f"**{c}**\n\n{_block(t)}" for c, t in zip(columns, row, strict=True)]
            self._writer.add_text(f"samples/{number}", "\n\n".join(parts), step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        for name, value in flat(summary or {}, "scoreboard"):
            step = (summary or {})["steps"]
            if isinstance(value, (int, float)):  # also whether something is so
                self._writer.add_scalar(name, value, step)
            else:
                self._writer.add_text(name, _block(str(value)), step)
        self._writer.close()


def _block(text: str) -> str:
    """Text as it is, in Markdown: indented, so that nothing in it is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
