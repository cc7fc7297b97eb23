"""A table's plot: for each row the mean, its interval as a line, and each seed as a dot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from bench.experiments.statistics import Mean

PLOT, RIGHT, ROW, TOP = 400, 90, 24, 44
LETTER = 6.6  # a character of the labels, at most on average
LINE, DOTS, AXIS, GRAY = "#2a6f97", "#c9793a", "#999", "#666"


def svg(
    title: str, axis: str, rows: Sequence[tuple[str, Mean]], show: Callable[[float], str]
) -> str:
    """The axis begins at 0 unless a value is below it, and ends at the largest."""
    ends = [v for _, m in rows for v in (*m.values, m.value, m.low, m.high) if v is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    span = (high - low) or 1.0
    bottom = TOP + ROW * len(rows)

    left = 24 + LETTER * max([0, *(len(label) for label, _ in rows)])
    right = left + PLOT
    width = right + RIGHT

    def across(value: float) -> float:
        return left + PLOT * (value - low) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 36}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{bottom + 36}" fill="#fff"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
        f'<path d="M{across(0):.1f} {TOP - 8}V{bottom}" stroke="{AXIS}"/>',
        f'<path d="M{left:.0f} {bottom}H{right:.0f}" stroke="{AXIS}"/>',
        f'<text x="{left:.0f}" y="{bottom + 16}" fill="{GRAY}">{show(low)}</text>',
        f'<text x="{right:.0f}" y="{bottom + 16}" text-anchor="end" fill="{GRAY}">'
        f"{show(high)}</text>",
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 16}" text-anchor="middle" '
        f'fill="{GRAY}">{escape(axis)}</text>',
    ]
    for index, (label, measured) in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        parts.append(
            f'<text x="{left - 12:.0f}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
        )
        if measured.low is not None and measured.high is not None:
            ends_of = f"M{across(measured.low):.1f} {y}H{across(measured.high):.1f}"
            parts.append(f'<path d="{ends_of}" stroke="{LINE}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across(v):.1f}" cy="{y}" r="2.5" fill="{DOTS}" fill-opacity="0.6"/>'
            for v in measured.values
        ]
        parts += [
            f'<circle cx="{across(measured.value):.1f}" cy="{y}" r="4.5" fill="{LINE}"/>',
            f'<text x="{right + 12:.0f}" y="{y + 4}">{show(measured.value)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
