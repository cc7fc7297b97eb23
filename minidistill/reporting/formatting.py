"""Figures as text, without colour: shared by both displays and the report."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from minidistill.errors import printable
from minidistill.types import Metrics

COLUMNS = (
    ("teacher kl", "teacher_kl"),
    ("reward", "reward/mean"),
    ("loss/policy", "loss/policy"),
    ("entropy", "entropy/student"),
    ("mismatch", "kl/sampler_mismatch"),
    ("lr", "optim/lr"),
)
RATES = ("perf/tokens_per_second", "perf/train_tokens_per_second")
HEAT = (0.02, 0.1, 0.5, 2.0)
"""Where a token's KL (nats) enters the next level of disagreement; about a factor of 5 apart."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_EVAL = re.compile(r"eval/(.+)/(?:([^/]+)/avg|(baseline_diff))")
_BREAKS = re.compile("[\n\u2028\u2029]")


def clean(text: object) -> str:
    """One line of harmless text: control characters gone, line breaks visible."""
    return _BREAKS.sub("⏎", printable(str(text))).replace("\t", "  ")


def number(value: Any) -> str:
    """Three significant digits; – for a value that is not there."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else clean(value)
    if not math.isfinite(value):
        return str(float(value))
    value = float(f"{value:.3g}")  # 999.9 is 1k, not 1e+03
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def count(value: int) -> str:
    """A number of things: exact while it is short."""
    return str(value) if value < 10_000 else number(value)


def signed(value: Any) -> str:
    text = number(value)
    return f"+{text}" if isinstance(value, (int, float)) and value > 0 else text


def percent(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{100 * value:.0f}%"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def level(kl: float | None) -> int | None:
    """How much the teacher disagrees with a token, 0 to len(HEAT); None where it is unknown."""
    if kl is None or math.isnan(kl):
        return None
    return sum(kl >= limit for limit in HEAT)


def sparkline(values: Sequence[float]) -> str:
    """One block a value, from the lowest to the highest; what is not finite is a gap."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def tokens_per_second(metrics: Metrics) -> float | None:
    return next((metrics[key] for key in RATES if key in metrics), None)


def evaluations(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`eval/{env}/{who}/avg` and `eval/{env}/baseline_diff` as {env: {who: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if match := _EVAL.fullmatch(key):
            found.setdefault(match[1], {})[match[2] or match[3]] = value
    return found


class Pace:
    """Steps per second over the last steps. Evaluations in between do not count."""

    def __init__(self, max_steps: int, window: int = 20) -> None:
        self.max_steps = max_steps
        self._seconds: deque[float] = deque(maxlen=window)
        self._mark = time.monotonic()

    def mark(self) -> None:
        """What was done until now was not part of a step."""
        self._mark = time.monotonic()

    def step(self) -> None:
        self._seconds.append(time.monotonic() - self._mark)
        self.mark()

    @property
    def rate(self) -> float | None:
        total = sum(self._seconds)
        return len(self._seconds) / total if total > 0 else None

    def eta(self, step: int) -> float | None:
        return max(0, self.max_steps - step) / self.rate if self.rate else None
