"""How fast the steps go, and how long a run still takes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard


class Pace:
    """Steps per second over the last steps, and the time that evaluations take between them."""

    def __init__(self, max_steps: int, window: int = 20, eval_interval: int | None = None) -> None:
        """`eval_interval` is in steps, 0 for an evaluation at the end only; None: there is none."""
        self.max_steps, self.eval_interval = max_steps, eval_interval
        self._seconds: deque[float] = deque(maxlen=window)
        self._step_start = time.monotonic()
        self._evaluation: float | None = None
        """Seconds of an evaluation between two steps."""
        self._end: float | None = None
        """Seconds of what follows the last step."""
        self._evaluated = 0
        """The last step that was evaluated."""

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the times from the records of a run that is resumed."""
        for record in records:
            if _is_time(seconds := record.get("time/eval")):
                self.evaluated(record["step"], seconds)
            elif _is_time(seconds := record.get("time/step")):
                self._seconds.append(seconds)

    def start_step(self) -> None:
        """Measure the next step from now; the time before was not part of a step."""
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        self._seconds.append(time.monotonic() - self._step_start)
        self.start_step()

    def evaluated(self, step: int, seconds: float | None) -> None:
        """Learn how long an evaluation took; step 0 is the baseline.

        The baseline makes the passes that follow the last step, on two roles: until an evaluation
        has been measured, one is expected to take half as long.
        """
        self._evaluated = step
        if not _is_time(seconds):
            return
        if step == 0:
            self._end, self._evaluation = seconds, seconds / 2
        else:
            self._evaluation = seconds

    @property
    def steps_per_second(self) -> float | None:
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None

    def seconds_left(self, step: int) -> float | None:
        """The estimated time from the end of `step` to the end of the run, with evaluations."""
        rate = self.steps_per_second
        if not rate:
            return None
        return max(0, self.max_steps - step) / rate + self._evaluations_left(step)

    def countdown(self, step: int) -> float | None:
        """`seconds_left`, less the time that has gone by since."""
        left = self.seconds_left(step)
        return None if left is None else max(0.0, left - (time.monotonic() - self._step_start))

    def _evaluations_left(self, step: int) -> float:
        """Seconds of the evaluations that follow `step`."""
        if self.eval_interval is None or self._evaluation is None:
            return 0.0
        count = 0
        if self.eval_interval > 0:
            done = max(step - 1, self._evaluated)
            count = max(0, (self.max_steps - 1) // self.eval_interval - done // self.eval_interval)
        end = self._evaluation if self._end is None else self._end
        return count * self._evaluation + (end if self._evaluated < self.max_steps else 0.0)


def _is_time(seconds: Any) -> TypeGuard[float]:
    return isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0
