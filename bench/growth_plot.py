"""The plot of `bench.growth`: a panel for each sweep, with the seconds of a step's parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LINES = {
    "step": ("#222", ()),
    "sampling": ("#2a6f97", ("prefill", "decode")),
    "training": ("#c9793a", ()),
    "scoring": ("#6a994e", ("score",)),
}
PANELS = ("context", "completion", "group", "batch", "vocabulary")
WIDTH, HEIGHT, COLUMNS = 250, 200, 3
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 40, 28, 190, 130


def svg(report: Mapping[str, Any]) -> str:
    """Seconds against a size, on axes that are logarithmic in the size and begin at 0 seconds."""
    names = [name for name in PANELS if name in report]
    rows = -(-len(names) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(names)), 60 + HEIGHT * rows
    legend = ", ".join(
        f'<tspan fill="{color}">{name}</tspan>' for name, (color, _) in LINES.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="12" y="20" font-size="14">A step as sizes grow</text>',
        f'<text x="12" y="38" fill="#666">seconds: {legend}</text>',
    ]
    for index, name in enumerate(names):
        x, y = WIDTH * (index % COLUMNS), 50 + HEIGHT * (index // COLUMNS)
        parts.append(f'<g transform="translate({x} {y})">')
        parts += panel(name, report[name]["points"])
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def panel(name: str, points: Mapping[str, Any]) -> list[str]:
    sizes = [int(size) for size in points]
    top = max(seconds("step", point) for point in points.values()) * 1.05
    first, last = math.log(min(sizes)), math.log(max(sizes))
    bottom = TOP + PLOT_HEIGHT

    def place(size: int, value: float) -> tuple[float, float]:
        across = (math.log(size) - first) / (last - first) if last > first else 0.5
        return LEFT + PLOT_WIDTH * across, bottom - PLOT_HEIGHT * value / top

    parts = [
        f'<text x="{LEFT}" y="18">{escape(name)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{LEFT + PLOT_WIDTH}" fill="none" stroke="#999"/>',
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end" fill="#666">{top:.0f}</text>',
        f'<text x="{LEFT - 4}" y="{bottom}" text-anchor="end" fill="#666">0</text>',
    ]
    for size in sizes:
        x, _ = place(size, 0)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#666">'
            f"{short(size)}</text>"
        )
    for line, (color, _) in LINES.items():
        places = [place(size, seconds(line, points[str(size)])) for size in sizes]
        parts.append(polyline(places, color))
    return parts


def polyline(places: Sequence[tuple[float, float]], color: str) -> str:
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in places)
    ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{ends}" fill="none" stroke="{color}"/>{marks}'


def seconds(line: str, point: Mapping[str, Any]) -> float:
    """Of a line of the plot, in one point of a sweep."""
    _, pieces = LINES[line]
    return float(sum(point["pieces"][piece] for piece in pieces) if pieces else point[line])


def short(size: int) -> str:
    """152k for 151,936."""
    return f"{size / 1000:.0f}k" if size >= 10_000 else str(size)
