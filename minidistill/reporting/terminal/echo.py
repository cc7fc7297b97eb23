"""What is typed is not shown while a live region is drawn: it would move the lines below it."""

from __future__ import annotations

import contextlib
import os
import termios
from typing import Any, TextIO

_ECHO = 3
"""The place of the local modes in what termios returns."""


class Echo:
    """Switches a terminal's echo off until `restore`. Ctrl-C is echoed too, as ^C.

    Nothing happens where the stream is no terminal, or where this process is in its background: it
    would be stopped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._descriptor: int | None = None
        self._before: list[Any] = []
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            descriptor = stream.fileno()
            if _in_foreground(descriptor):
                self._before = termios.tcgetattr(descriptor)
                modes = list(self._before)
                modes[_ECHO] &= ~termios.ECHO
                termios.tcsetattr(descriptor, termios.TCSADRAIN, modes)
                self._descriptor = descriptor

    def restore(self) -> None:
        """Set the terminal back. May be called more than once."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError, termios.error):
            if _in_foreground(descriptor):
                termios.tcsetattr(descriptor, termios.TCSADRAIN, self._before)


def _in_foreground(descriptor: int) -> bool:
    return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
