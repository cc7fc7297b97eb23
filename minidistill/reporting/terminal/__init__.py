"""The terminal: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from typing import TextIO, cast

from minidistill.reporting.terminal.base import Display, Header, Sample
from minidistill.reporting.terminal.output import Output, lasting_output
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.reporting.terminal.quiet import QuietDisplay
from minidistill.reporting.terminal.safe import SafeDisplay
from minidistill.system.symbols import wants_ascii

__all__ = ["Display", "Header", "SafeDisplay", "Sample", "lasting_output", "open_display"]


def open_display(stream: TextIO | None = None, *, quiet: bool = False) -> Display:
    """The display for `stream` (default: standard output), whose reader may go away.

    Plain wherever a live region would not work: no terminal, a dumb one, or one without UTF-8.
    `quiet` leaves the run's directory, warnings and the scoreboard.
    """
    stream = cast(TextIO, Output(sys.stdout if stream is None else stream))
    if quiet:
        return QuietDisplay(stream, in_ascii=wants_ascii(stream))
    if wants_ascii(stream):
        return PlainDisplay(stream, in_ascii=True)
    if not stream.isatty():
        return PlainDisplay(stream)
    from minidistill.reporting.terminal.live import LiveDisplay

    return LiveDisplay(stream)
