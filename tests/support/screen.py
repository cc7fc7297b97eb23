"""What a terminal shows: enough of one for what rich writes, and a command that runs in it."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

TOKEN = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|\x1b[^\[]|(.)", re.S)


class Screen:
    """Lines as they end up, those that have scrolled away among them.

    One cell a character, which wraps when the next one comes, as terminals do.
    """

    def __init__(self, width: int) -> None:
        self.width, self.lines = width, [""]
        self.row = self.column = 0
        self.cursor_hidden = False

    def feed(self, text: str) -> None:
        for match in TOKEN.finditer(text):
            numbers, command, char = match.groups()
            if char is not None:
                self._put(char)
            elif command == "A":
                self.row = max(0, self.row - int(numbers or 1))
            elif command == "K":
                self.lines[self.row] = ""  # rich erases whole lines
            elif command in "hl" and numbers == "?25":
                self.cursor_hidden = command == "l"

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._next_line()
        elif char >= " ":
            if self.column == self.width:
                self.column = 0
                self._next_line()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
            self.column += 1

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def _be(program: Callable[[], int], width: int) -> NoReturn:
    """The child's part."""
    code = 99
    try:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        os.environ |= {"TERM": "xterm", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
        os.environ.pop("COLUMNS", None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        code = program()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def in_terminal(
    program: Callable[[], int], see: Callable[[str, int], bytes], width: int = 80
) -> tuple[int, Screen, bool]:
    """Run a function in a fork of this process, in a terminal.

    `see(text, typed)` gets all that it has written and the number of bytes that were typed, and
    returns what to type next. Returns the exit code, the screen, and whether the terminal echoes
    what is typed at the end.
    """
    terminal, end = os.openpty()
    process = os.fork()
    if process == 0:
        os.close(terminal)
        os.login_tty(end)
        _be(program, width)
    text, typed, status = "", 0, None
    deadline = time.monotonic() + 100
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.05)[0]:
            text += decoder.decode(os.read(terminal, 1 << 16))
            continue
        if status is not None:
            break
        if status is None:
            ended, code = os.waitpid(process, os.WNOHANG)
            status = code if ended else None
        if status is None and (keys := see(text, typed)):
            typed += os.write(terminal, keys)
    echoes = bool(termios.tcgetattr(end)[3] & termios.ECHO)
    os.close(terminal)
    os.close(end)
    screen = Screen(width)
    screen.feed(text)
    return os.waitstatus_to_exitcode(status), screen, echoes
