"""The configuration's `[health]`: guards over the course of training."""

from __future__ import annotations

from typing import Literal

from minidistill.config.base import Positive, Table

Action = Literal["warn", "stop", "off"]


class HealthConfig(Table):
    """Guards over the course of training. One that applies for `patience` steps in a row warns
    once, or stops the run (exit code 4) after it has saved a checkpoint. docs/metrics.md has the
    limits."""

    patience: Positive = 10
    """Steps in a row, and the length of the start that later steps are compared with."""
    no_gradient: Action = "stop"
    """The gradient is exactly 0, and the KL to the teacher is not."""
    entropy_collapse: Action = "warn"
    """The student's entropy on its own samples is next to nothing, or a tenth of its start."""
    length_explosion: Action = "warn"
    """Completions are three times as long as at the start, or most of them are cut off."""
    kl_explosion: Action = "warn"
    """The KL to the teacher is far above the lowest that it has been."""
    equal_rewards: Action = "warn"
    """The rewards within each group are equal, so there is no advantage to learn from."""
