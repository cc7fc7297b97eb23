"""The geometry of line charts. The template writes the SVG, so that it escapes all text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.reporting.formatting import number

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 34
MAX_POINTS = 300
"""Points of a curve; more are thinned out, because the page has about as many pixels."""

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps: `flat` for a reference line, `marked` to draw each point as a dot."""

    name: str
    points: Points
    flat: bool = False
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A drawn series: its SVG path, dots as (x, y, step, value), and values for the legend."""

    name: str
    path: str
    dots: tuple[tuple[float, float, int, float], ...]
    flat: bool
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart; ticks are (position, label)."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM

    @property
    def label(self) -> str:
        """The chart in words, for screen readers."""
        return f"{self.title} over steps. " + " ".join(
            f"{line.name}: {number(line.first)}."
            if line.flat or line.first == line.last
            else f"{line.name}: from {number(line.first)} to {number(line.last)}."
            for line in self.lines
        )


def draw(title: str, note: str, series: Sequence[Series]) -> Chart:
    """Scale the series to shared axes. A value that is not finite is a gap in its line."""
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    if not finite:
        return Chart(title, note, ())
    xs = _scale([x for x, _ in finite], LEFT, WIDTH - RIGHT, pad=0.0)
    ys = _scale([y for _, y in finite], HEIGHT - BOTTOM, TOP, pad=0.06)
    lines = []
    for s in series:
        points = [(x, y) for x, y in s.points if math.isfinite(y)]
        if points:
            # A single point has no line that would show it.
            dotted = thin(points) if s.marked or len(points) == 1 else []
            dots = tuple((xs(x), ys(y), x, y) for x, y in dotted)
            path = _path(thin(s.points), xs, ys)
            lines.append(Line(s.name, path, dots, s.flat, points[0][1], points[-1][1]))
    steps = sorted({round(tick) for tick in xs.ticks(6)})
    return Chart(
        title,
        note,
        tuple(lines),
        x_ticks=tuple((xs(tick), str(tick)) for tick in steps if xs.low <= tick <= xs.high),
        y_ticks=tuple((ys(tick), number(tick)) for tick in ys.ticks(5)),
    )


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """About `limit` points at most: the lowest and the highest of each interval, in order."""
    if len(points) <= limit:
        return points
    kept: Points = []
    size = math.ceil(len(points) / (limit // 2))
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        extremes = {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
        kept += sorted(extremes)
    return sorted({points[0], *kept, points[-1]})


class _Scale:
    """Maps the values of one axis to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return round(self._start + fraction * (self._end - self._start), 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the axis."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def _scale(values: Sequence[float], start: float, end: float, pad: float) -> _Scale:
    low, high = min(values), max(values)
    # The axis has a width even if there is one value, or values that differ by rounding only.
    min_width = max(1e-9, 1e-6 * max(abs(low), abs(high)))
    if high - low < min_width:
        middle = 0.5 * abs(low) or 0.5
        low, high = low - middle, high + middle
    margin = pad * (high - low)
    return _Scale(low - margin, high + margin, start, end)


def _path(points: Points, xs: _Scale, ys: _Scale) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{pen}{xs(x)} {ys(y)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)
