"""A completion whose tokens are colored by how much the teacher disagrees."""

from __future__ import annotations

from itertools import zip_longest

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from minidistill.reporting.formatting import KL_LEVELS, clean, kl_level, number
from minidistill.reporting.terminal.base import Sample

# Readable on light and dark backgrounds. The worst two are also bold, the worst underlined, for
# readers who do not see the colors.
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
        token_text = clean(token)
        used += cell_len(token_text)
        if used > cells - 1:
            text.append("…", UNKNOWN)
            break
        heat = kl_level(kl)
        text.append(token_text, UNKNOWN if heat is None else STYLES[heat])
    return text


def legend() -> Text:
    """What the colors mean, in nats."""
    text = Text("teacher KL ", UNKNOWN)
    names = [f"<{number(limit)}" for limit in KL_LEVELS] + [f"≥{number(KL_LEVELS[-1])}"]
    for name, style in zip(names, STYLES, strict=True):
        text.append(name, style)
        text.append(" ")
    return text.append("nats", UNKNOWN)
