"""How fast the steps go."""

from __future__ import annotations

import time
from collections import deque


class Pace:
    """Steps per second over the last steps. Evaluations in between do not count."""

    def __init__(self, max_steps: int, window: int = 20) -> None:
        self.max_steps = max_steps
        self._seconds: deque[float] = deque(maxlen=window)
        self._step_start = time.monotonic()

    def start_step(self) -> None:
        """Measure the next step from now; the time before was not part of a step."""
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        self._seconds.append(time.monotonic() - self._step_start)
        self.start_step()

    @property
    def steps_per_second(self) -> float | None:
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None

    def seconds_left(self, step: int) -> float | None:
        """The estimated time from the end of `step` to the end of the run."""
        rate = self.steps_per_second
        return max(0, self.max_steps - step) / rate if rate else None
