"""Where a chat's answers go: plain lines, or columns that grow on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minidistill.errors import printable
from minidistill.look.chat import Answer
from minidistill.look.views import View

NARROWEST = 24
"""Cells of a column. In a narrower terminal the answers stand below each other."""
REFRESH_SECONDS = 0.06
ENDS = {"length": "cut off: --max-tokens makes it longer", "stopped": "stopped"}


class Screen(Protocol):
    """Shows the answers to a question."""

    def begin(self) -> None:
        """A question has been asked."""

    def show(self, view: int, text: str) -> None:
        """An answer so far."""

    def end(self, answers: Sequence[Answer]) -> None:
        """All of them."""


class Lines:
    """Plain text: the answer alone, or each with the name of its view.

    With `streams` an only answer is written as it grows.
    """

    def __init__(self, views: Sequence[View], stream: TextIO, *, streams: bool) -> None:
        self.views, self.stream = views, stream
        self.streams = streams and len(views) == 1
        self._written = ""

    def begin(self) -> None:
        self._written = ""

    def show(self, view: int, text: str) -> None:
        # a tokenizer may rewrite the end of a text with the next token
        if self.streams and text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text

    def end(self, answers: Sequence[Answer]) -> None:
        for view, answer in zip(self.views, answers, strict=True):
            if len(answers) > 1:
                self._write(f"{view.name}: {answer.text}\n")
                continue
            again = "" if answer.text.startswith(self._written) else "\n"
            rest = answer.text if again else answer.text[len(self._written) :]
            self._write(f"{again}{rest}\n")
            if self.streams and answer.end in ENDS:
                self._write(f"[{ENDS[answer.end]}]\n")

    def _write(self, text: str) -> None:
        self.stream.write(printable(text))
        self.stream.flush()


class Columns:
    """The answers beside each other, or in a narrow terminal below each other."""

    def __init__(self, views: Sequence[View], console: Console) -> None:
        self.views, self.console = views, console
        self._live: Live | None = None
        self._texts: list[str] = []
        self._drawn = 0.0

    def begin(self) -> None:
        self._texts, self._drawn = [""] * len(self.views), 0.0
        # what has been drawn is replaced by the whole answers, which may be longer than the screen
        self._live = Live(console=self.console, transient=True, auto_refresh=False)
        self._live.start()

    def show(self, view: int, text: str) -> None:
        self._texts[view] = text
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= REFRESH_SECONDS:
            self._live.update(self._table(self._texts, self.console.height - 4), refresh=True)
            self._drawn = now

    def end(self, answers: Sequence[Answer]) -> None:
        self.close()
        self.console.print(self._table([a.text for a in answers], None, [a.end for a in answers]))

    def close(self) -> None:
        """Restore the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(
        self, texts: Sequence[str], lines: int | None, ends: Sequence[str] = ()
    ) -> RenderableType:
        """The answers; with `lines` only as many of the last lines."""
        count = len(self.views)
        beside = self.console.width // count >= NARROWEST
        width = self.console.width // count - 2 if beside else self.console.width
        most = None if lines is None else max(1, lines if beside else lines // count - 1)
        cells = [self._cell(text, width, most) for text in texts]
        for cell, end in zip(cells, ends, strict=False):
            if end in ENDS:
                cell.append(f"\n[{ENDS[end]}]", "dim")
        if not beside:
            parts: list[RenderableType] = []
            for view, cell in zip(self.views, cells, strict=True):
                parts += [Text(view.name, "bold"), cell]
            return Group(*parts)
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for view in self.views:
            table.add_column(view.name, ratio=1, overflow="fold")
        table.add_row(*cells)
        return table

    def _cell(self, text: str, width: int, most: int | None) -> Text:
        cell = Text(printable(text), overflow="fold")
        if most is None:
            return cell
        return Text("\n").join(cell.wrap(self.console, width)[-most:])
