"""The geometry of line charts. The template writes the SVG, so that it escapes all text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minidistill.reporting.formatting import number

WIDTH, HEIGHT = 380, 210
"""As wide as a third of the page, or a phone's screen: text has its size on both."""
LEFT, RIGHT, TOP, BOTTOM = 54, 22, 12, 36
MAX_POINTS = 240
"""Points of a curve; more are thinned out, because the page has about as many pixels."""
SMOOTHED = 40
"""Points from which on a curve has no dots, and is drawn as its moving mean, the points faintly."""
WINDOWS = 20
"""Windows of the moving mean in a curve, about."""
TINY = 1e-300
"""A height below this is none: its tenth parts have no floats of full precision."""

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Values over steps: `flat` for a reference line, `marked` to draw each point as a dot.

    `color` is its place among the series, those without values included.
    """

    name: str
    points: Points
    flat: bool = False
    marked: bool = False
    color: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A drawn series: its SVG path, dots as (x, y), and values for the legend.

    `faint` is the path of the points where `path` is that of their moving mean, else empty.
    """

    name: str
    color: int
    path: str
    faint: str
    dots: tuple[tuple[float, float], ...]
    flat: bool
    first: float
    last: float

    @property
    def is_constant(self) -> bool:
        """Whether one value says it all."""
        return self.flat or self.first == self.last


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart; ticks are (position, label).

    `rows` is its table: a label of the x axis, and a text for each line. `x_range` is the first and
    the last step of the axis, None if it has no steps.
    """

    title: str
    note: str
    lines: tuple[Line, ...]
    x_name: str = "step"
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    x_range: tuple[float, float] | None = None
    rows: tuple[tuple[str, ...], ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def label(self) -> str:
        """The chart in words, for screen readers."""
        over = "steps" if self.x_name == "step" else self.x_name
        return f"{self.title} over {over}. " + " ".join(
            f"{line.name}: {number(line.first)}."
            if line.is_constant
            else f"{line.name}: from {number(line.first)} to {number(line.last)}."
            for line in self.lines
        )


def draw(title: str, note: str, series: Sequence[Series], *, zero: bool = False) -> Chart:
    """Scale the series to shared axes, with `zero` from 0 on.

    A value that is not finite is a gap in its line.
    """
    series = _with_values(series)
    if not series:
        return Chart(title, note, ())
    xs, ys = _scales(series, zero)
    steps = sorted({round(tick) for tick in xs.ticks(5)})
    steps = [step for step in steps if xs.low <= step <= xs.high]
    return Chart(
        title,
        note,
        _lines(series, xs, ys),
        x_ticks=tuple(zip(map(xs, steps), _labels(steps, exact=100_000), strict=True)),
        y_ticks=ys.labelled(4),
        x_range=(xs.low, xs.high),
        rows=_rows(series),
    )


def draw_over(
    title: str,
    note: str,
    x_name: str,
    names: Sequence[tuple[str, str]],
    series: Sequence[Series],
) -> Chart:
    """A chart over what has names, such as positions: a point's x is the index of its name.

    `names` are (short name for the axis, name in the table) pairs.
    """
    series = _with_values(series)
    if not series:
        return Chart(title, note, (), x_name)
    xs, ys = _scales(series, zero=True)
    every = math.ceil(len(names) / 7)  # labels that have room beside each other
    ticks = tuple((xs(i), name) for i, (name, _) in enumerate(names) if i % every == 0)
    lines, rows = _lines(series, xs, ys), _rows(series, [name for _, name in names])
    return Chart(title, note, lines, x_name, ticks, ys.labelled(4), rows=rows)


def _with_values(series: Sequence[Series]) -> list[Series]:
    placed = (replace(s, color=place) for place, s in enumerate(series))
    return [s for s in placed if any(math.isfinite(y) for _, y in s.points)]


def _scales(series: Sequence[Series], zero: bool) -> tuple[_Scale, _Scale]:
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    values = [y for _, y in finite]
    bottom, top = HEIGHT - BOTTOM, TOP
    if zero and min(values) >= 0:
        highest = max(values)
        ys = _Scale(0.0, 1.06 * highest if highest > TINY else 1.0, bottom, top)
    else:
        ys = _scale(values, bottom, top, pad=0.06)
    return _scale([x for x, _ in finite], LEFT, WIDTH - RIGHT, pad=0.0), ys


def _lines(series: Sequence[Series], xs: _Scale, ys: _Scale) -> tuple[Line, ...]:
    lines = []
    for s in series:
        points = [(x, y) for x, y in s.points if math.isfinite(y)]
        path, faint = _path(thin(s.points), xs, ys), ""
        if len(points) >= SMOOTHED and not (s.flat or s.marked):
            path, faint = _path(thin(moving_mean(points)), xs, ys), path
        # A single point has no line that would show it.
        marked = s.marked and len(points) <= SMOOTHED
        dotted = points if marked or len(points) == 1 else []
        dots = tuple((xs(x), ys(y)) for x, y in dotted)
        ends = points[0][1], points[-1][1]
        lines.append(Line(s.name, s.color, path, faint, dots, s.flat, *ends))
    return tuple(lines)


def _rows(
    series: Sequence[Series], names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The table: every x of the thinned points, with each series' value there."""
    columns = [dict(thin(s.points)) for s in series]
    # a reference line has one value, which is that of every row
    drawn = [c for c, s in zip(columns, series, strict=True) if not s.flat] or columns
    rows = []
    for x in sorted({x for column in drawn for x in column}):
        values = [
            number(s.points[-1][1]) if s.flat else number(column[x]) if x in column else ""
            for column, s in zip(columns, series, strict=True)
        ]
        rows.append((str(x) if names is None else names[x], *values))
    return tuple(rows)


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


def moving_mean(points: Points) -> Points:
    """Each point with the mean of those around it, fewer of them towards the ends."""
    reach = max(2, len(points) // (2 * WINDOWS))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        start, end = max(0, i - reach), min(len(points), i + reach + 1)
        means.append((x, (sums[end] - sums[start]) / (end - start)))
    return means


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

    def labelled(self, count: int) -> tuple[tuple[float, str], ...]:
        """The positions of about `count` round values, with their labels."""
        ticks = self.ticks(count)
        return tuple(zip(map(self, ticks), _labels(ticks), strict=True))


def _labels(values: Sequence[float], exact: float = 0) -> list[str]:
    """Short texts that differ. Whole numbers below `exact` are in full."""
    if all(abs(value) < exact for value in values):
        return [str(value) for value in values]
    for label in (number, *(f"{{:.{digits}g}}".format for digits in range(4, 17))):
        labels = [label(value) for value in values]
        if len(set(labels)) == len(labels):
            return labels
    return labels


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
    parts: list[str] = []
    pen, alone = "M", False
    for x, y in [*points, (0, math.nan)]:
        if math.isfinite(y):
            parts.append(f"{pen}{xs(x)} {ys(y)}")
            pen, alone = "L", pen == "M"
        else:
            parts.append("h0" if alone else "")  # a dot, for a point between gaps
            pen, alone = "M", False
    return "".join(parts)
