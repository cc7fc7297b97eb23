"""Pages on a terminal, with keys to go through them. The terminal is restored at any end."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

KEYS = {
    b"n": "next", b"l": "next", b"\x1b[C": "next", b"\x1bOC": "next",
    b"p": "previous", b"h": "previous", b"\x1b[D": "previous", b"\x1bOD": "previous",
    b"j": "down", b"\r": "down", b"\n": "down", b"\x1b[B": "down", b"\x1bOB": "down",
    b"k": "up", b"\x1b[A": "up", b"\x1bOA": "up",
    b" ": "page down", b"\x1b[6~": "page down", b"b": "page up", b"\x1b[5~": "page up",
    b"g": "first", b"\x1b[H": "first", b"\x1bOH": "first", b"\x1b[1~": "first",
    b"G": "last", b"\x1b[F": "last", b"\x1bOF": "last", b"\x1b[4~": "last",
    b"q": "quit", b"Q": "quit", b"\x03": "quit", b"\x04": "quit",
}  # fmt: skip
HELP = "n next  p previous  arrows scroll  g G first last  q quit"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The alternate screen, and no cursor."""
LOOK_SECONDS = 0.25
"""How often the terminal's size is looked at while no key is pressed."""
_KEY = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.)?|.", re.DOTALL)

Page = Callable[[int], Text]


def page_through(count: int, page: Page, console: Console) -> None:
    """Show `page(0)` to `page(count - 1)` one at a time until the user quits."""
    Pager(count, page, console).run()


class Pager:
    """Which page is shown, and from which of its lines on."""

    def __init__(self, count: int, page: Page, console: Console) -> None:
        self.count, self.page, self.console = count, page, console
        self.index = self.top = 0
        self._lines: tuple[tuple[int, int], list[list[Segment]]] | None = None

    def run(self) -> None:
        fd = sys.stdin.fileno()
        with _raw(fd), _alternate_screen():
            for keys in _keys(fd, self.draw):
                for key in keys:
                    if KEYS.get(key) == "quit":
                        return
                    self.press(KEYS.get(key, ""))

    def press(self, action: str) -> None:
        """Do what a key says."""
        height = self._height()
        if action in ("next", "previous"):
            step = 1 if action == "next" else -1
            index = min(max(self.index + step, 0), self.count - 1)
            if index != self.index:
                self.index, self.top = index, 0
            return
        if action in ("first", "last"):
            self.index, self.top = 0 if action == "first" else self.count - 1, 0
            return
        if action == "page down" and self.top >= self._last_top() and self.index + 1 < self.count:
            self.press("next")
            return
        moves = {"down": 1, "up": -1, "page down": height, "page up": -height}
        self.top = min(max(self.top + moves.get(action, 0), 0), self._last_top())

    def draw(self) -> None:
        """Write the visible lines and the keys."""
        self.top = min(self.top, self._last_top())
        lines, height = self._rendered(), self._height()
        shown = lines[self.top : self.top + height]
        more = len(lines) - self.top - len(shown)
        status = f" {self.index + 1}/{self.count}  {f'{more} lines below  ' if more else ''}{HELP}"
        bar = Text(status[: self.console.width - 1], "reverse")
        with self.console.capture() as capture:
            ended = [segment for line in shown for segment in (*line, Segment.line())]
            self.console.print(Segments(ended), end="")
            self.console.print(bar, end="")
        sys.stdout.write("\x1b[H\x1b[J" + capture.get())
        sys.stdout.flush()

    def _height(self) -> int:
        return max(1, self.console.height - 1)

    def _last_top(self) -> int:
        return max(0, len(self._rendered()) - self._height())

    def _rendered(self) -> list[list[Segment]]:
        place = self.index, self.console.width
        if self._lines is None or self._lines[0] != place:
            options = self.console.options.update(width=max(1, self.console.width - 1))
            lines = self.console.render_lines(self.page(self.index), options, pad=False)
            self._lines = place, lines
        return self._lines[1]


def _keys(fd: int, draw: Callable[[], None]) -> Iterator[list[bytes]]:
    """Keys as they are pressed, until the terminal is gone. Draws before waiting for the next, and
    when the terminal has another size."""
    size: Any = None
    draw()
    while True:
        ready, _, _ = select.select([fd], [], [], LOOK_SECONDS)
        if not ready:
            before, size = size, os.get_terminal_size(fd)
            if before is not None and size != before:
                draw()
            continue
        try:
            data = os.read(fd, 1024)
        except OSError:
            return
        if not data:
            return
        yield _KEY.findall(data)
        draw()


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Keys without Enter and echo; Ctrl-C is a key, and Ctrl-Z does not leave the screen as is."""
    before = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    try:
        termios.tcsetattr(fd, termios.TCSANOW, raw)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)


@contextlib.contextmanager
def _alternate_screen() -> Iterator[None]:
    try:
        sys.stdout.write(ENTER)
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(LEAVE)
            sys.stdout.flush()
