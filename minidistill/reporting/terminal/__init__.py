"""The terminal: a live display where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from minidistill.reporting.terminal.base import Advance, Display, Header, Sample
from minidistill.reporting.terminal.plain import PlainDisplay

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Advance", "Display", "Header", "Sample", "open_display", "render_scoreboard"]


def open_display(stream: TextIO | None = None) -> Display:
    """The display for `stream` (default: standard output).

    Plain wherever a live region would not work: no terminal, a dumb one, or an encoding without
    the block characters.
    """
    stream = sys.stdout if stream is None else stream
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    if not stream.isatty() or dumb or not encoding.startswith("utf"):
        return PlainDisplay(stream)
    from minidistill.reporting.terminal.live import LiveDisplay

    return LiveDisplay(stream)


def render_scoreboard(board: Mapping[str, Any]) -> RenderableType:
    """The final scoreboard as a rich renderable, for the terminal and for `export_svg`."""
    from minidistill.reporting.terminal.board import render_scoreboard as render

    return render(board)
