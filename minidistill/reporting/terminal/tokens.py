"""A completion with every token coloured by how much the teacher disagrees."""

from __future__ import annotations

from itertools import zip_longest

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from minidistill.reporting.formatting import HEAT, clean, level, number
from minidistill.reporting.terminal.base import Sample

# Readable on light and dark grounds; the worst two are also bold and underlined, because colour
# alone does not reach everyone.
STYLES = (
    Style(color="color(34)"),
    Style(color="color(106)"),
    Style(color="color(178)"),
    Style(color="color(166)", bold=True),
    Style(color="color(160)", bold=True, underline=True),
)
UNKNOWN = Style(dim=True)


def sample_text(sample: Sample, cells: int) -> Text:
    """The first tokens of the sample that fit into `cells` terminal cells."""
    text, used = Text(), 0
    for token, kl in zip_longest(sample.tokens, sample.kl[: len(sample.tokens)]):
        shown = clean(token)
        used += cell_len(shown)
        if used > cells - 1:
            text.append("…", UNKNOWN)
            break
        heat = level(kl)
        text.append(shown, UNKNOWN if heat is None else STYLES[heat])
    return text


def legend() -> Text:
    """What the colours mean, in nats."""
    text = Text("teacher KL ", UNKNOWN)
    names = [f"<{number(limit)}" for limit in HEAT] + [f"≥{number(HEAT[-1])}"]
    for name, style in zip(names, STYLES, strict=True):
        text.append(name, style)
        text.append(" ")
    return text.append("nats", UNKNOWN)
