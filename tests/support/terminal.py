"""A program on a terminal of its own: what it writes, and the keys that it gets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from typing import Any

from support.paths import ROOT

SECONDS = 60.0


def inherited() -> dict[str, str]:
    """The environment without a size of the terminal, which pytest-xdist may set: rich believes it
    more than the terminal."""
    return {key: value for key, value in os.environ.items() if key not in ("LINES", "COLUMNS")}


class Terminal:
    """`python -m minidistill ARGS` with a controlling terminal."""

    def __init__(self, args: Sequence[str], rows: int, columns: int, **environment: str) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(rows, columns)
        self.output = ""
        self.before = self.settings()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minidistill", *args],
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, cwd=ROOT,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**inherited(), "TERM": "xterm", "CUDA_VISIBLE_DEVICES": "", **environment},
        )  # fmt: skip

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, size)

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.theirs)

    def send(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def read_until(self, text: str) -> str:
        """What it has written since the last call, up to `text`."""
        deadline = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output!r}"
            self._read()
        end = self.output.index(text) + len(text)
        found, self.output = self.output[:end], self.output[end:]
        return found

    def send_until(self, keys: bytes, text: str) -> str:
        """Send the keys, and again each second, until it has written `text`; as `read_until`."""
        deadline = time.monotonic() + SECONDS
        while text not in self.output and time.monotonic() < deadline:
            self.send(keys)
            again = time.monotonic() + 1.0
            while text not in self.output and time.monotonic() < again:
                self._read()
        return self.read_until(text)

    def wait(self) -> int:
        """The exit code; `output` has the rest of what was written."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it runs on after {self.output!r}"
            self._read()
        while self._read():
            pass
        return self.process.returncode

    def _read(self) -> bool:
        ready, _, _ = select.select([self.ours], [], [], 0.05)
        if ready:
            self.output += os.read(self.ours, 1 << 16).decode(errors="replace")
        return bool(ready)


@contextlib.contextmanager
def terminal(
    *args: str, rows: int = 24, columns: int = 80, **environment: str
) -> Iterator[Terminal]:
    opened = Terminal(args, rows, columns, **environment)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.ours)
        os.close(opened.theirs)
