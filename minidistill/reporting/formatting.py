"""Figures as text without color, for both displays and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minidistill.errors import bounded, printable
from minidistill.types import Metrics

FIGURES = (
    ("teacher kl", "teacher_kl"),
    ("reward", "reward/mean"),
    ("loss/policy", "loss/policy"),
    ("entropy", "entropy/student"),
    ("mismatch", "kl/sampler_mismatch"),
    ("lr", "optim/lr"),
)
"""The metrics in the live display: name shown, metric."""
RATES = ("perf/tokens_per_second", "perf/train_tokens_per_second")
KL_LEVELS = (0.02, 0.1, 0.5, 2.0)
"""A token's KL (nats) at which the next level of disagreement begins, about a factor of 5 apart."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_EVAL = re.compile(r"eval/(.+)/(?:([^/]+)/avg|(baseline_diff))")
_BREAKS = re.compile("[\n\u2028\u2029]")


LONGEST = 10_000
"""Characters of a line in the terminal."""


def clean(text: object) -> str:
    """One line of safe text: bounded, without control characters, line breaks shown as ⏎."""
    return _BREAKS.sub("⏎", printable(bounded(str(text), LONGEST))).replace("\t", "  ")


def number(value: Any) -> str:
    """Three significant digits; – for None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else clean(value)
    if not math.isfinite(value):
        return str(float(value))
    value = float(f"{value:.3g}")  # 999.9 is 1k, not 1e+03
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if scale <= abs(value) < 1e12:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def count(value: int) -> str:
    """A number of things, exact up to four digits."""
    return str(value) if value < 10_000 else number(value)


def signed(value: Any) -> str:
    text = number(value)
    return f"+{text}" if isinstance(value, (int, float)) and value > 0 else text


def percent(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{100 * value:z.0f}%"  # z: no -0


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def kl_level(kl: float | None) -> int | None:
    """How much the teacher disagrees with a token, 0 to len(KL_LEVELS); None if unknown."""
    if kl is None or math.isnan(kl):
        return None
    return sum(kl >= limit for limit in KL_LEVELS)


def sparkline(values: Sequence[float]) -> str:
    """One block per value, scaled from the lowest to the highest; a gap if not finite."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def tokens_per_second(metrics: Metrics) -> float | None:
    return next((metrics[key] for key in RATES if key in metrics), None)


def evaluations(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`eval/{env}/{name}/avg` and `eval/{env}/baseline_diff` as {env: {name: value}}."""
    by_env: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        if match := _EVAL.fullmatch(key):
            by_env.setdefault(match[1], {})[match[2] or match[3]] = value
    return by_env
