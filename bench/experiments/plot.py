"""A table's plot: for each row the mean, its interval as a line, and each seed as a dot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from bench.experiments.statistics import Mean

WIDTH, LEFT, RIGHT, ROW, TOP = 720, 230, 90, 24, 44
LINE, DOTS, AXIS, GRAY = "#2a6f97", "#c9793a", "#999", "#666"


def svg(
    title: str, axis: str, rows: Sequence[tuple[str, Mean]], show: Callable[[float], str]
) -> str:
    """The axis begins at 0 unless a value is below it, and ends at the largest."""
    ends = [v for _, m in rows for v in (*m.values, m.value, m.low, m.high) if v is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    span = (high - low) or 1.0
    bottom = TOP + ROW * len(rows)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 36}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + 36}" fill="#fff"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
        f'<path d="M{across(0):.1f} {TOP - 8}V{bottom}" stroke="{AXIS}"/>',
        f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="{AXIS}"/>',
        f'<text x="{LEFT}" y="{bottom + 16}" fill="{GRAY}">{show(low)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 16}" text-anchor="end" fill="{GRAY}">'
        f"{show(high)}</text>",
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 16}" text-anchor="middle" '
        f'fill="{GRAY}">{escape(axis)}</text>',
    ]
    for index, (label, measured) in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        if measured.low is not None and measured.high is not None:
            ends_of = f"M{across(measured.low):.1f} {y}H{across(measured.high):.1f}"
            parts.append(f'<path d="{ends_of}" stroke="{LINE}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across(v):.1f}" cy="{y}" r="2.5" fill="{DOTS}" fill-opacity="0.6"/>'
            for v in measured.values
        ]
        parts += [
            f'<circle cx="{across(measured.value):.1f}" cy="{y}" r="4.5" fill="{LINE}"/>',
            f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4}">{show(measured.value)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
