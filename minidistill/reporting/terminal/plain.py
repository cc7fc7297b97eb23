"""Plain lines for logs and pipes: no escape codes, one line a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from minidistill.reporting import formatting as figures
from minidistill.reporting.terminal.base import Advance, Header, Sample
from minidistill.reporting.terminal.rows import effort, env_rows, scoreboard_rows
from minidistill.types import Metrics

HEARTBEAT_SECONDS = 30.0
"""A phase that takes longer says how far it is, so that a log does not look dead."""


class PlainDisplay:
    """Writes whole lines and flushes each."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._pace = figures.Pace(max_steps=0)

    def open(self, header: Header) -> None:
        self._pace = figures.Pace(header.max_steps)
        self._write(figures.clean(header.title))
        self._table([(name, value) for name, value in header.rows])
        if header.first_step > 1:
            self._write(f"  resumed at step {header.first_step}")

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        done, said = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            if time.monotonic() - said >= HEARTBEAT_SECONDS:
                said = time.monotonic()
                self._write(f"  {figures.clean(name)} {done}/{total} {figures.clean(unit)}")

        yield advance

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._pace.step()
        parts = [f"step {step}/{self._pace.max_steps}"]
        loss = "loss/total" if "loss/total" in metrics else "loss/policy"
        for name, key in (("kl", "teacher_kl"), ("reward", "reward/mean"), ("loss", loss)):
            if key in metrics:
                parts.append(f"{name} {figures.number(metrics[key])}")
        rate = figures.tokens_per_second(metrics)
        if rate is not None:
            parts.append(f"{figures.number(rate)} tok/s")
        parts.append(f"eta {figures.duration(self._pace.eta(step))}")
        self._write("  ".join(parts))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for env, values in figures.evaluations(metrics).items():
            shown = [f"{who} {figures.number(value)}" for who, value in values.items()]
            self._write("  ".join([f"evaluation at step {step}", env, *shown]))
        self._pace.mark()

    def baseline(self, metrics: Metrics) -> None:
        rows = [("baseline", "student", "teacher", "difference")]
        for env, values in figures.evaluations(metrics).items():
            rows.append(
                (
                    env,
                    figures.number(values.get("baseline_student")),
                    figures.number(values.get("baseline_teacher")),
                    figures.signed(values.get("baseline_diff")),
                )
            )
        self._table(rows)
        self._pace.mark()

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        self._write(f"scoreboard  {figures.clean(board.get('env') or '')}".rstrip())
        self._table(scoreboard_rows(board))
        if rows := env_rows(board):
            self._table([("environment", "before", "after", "teacher", "gap closed"), *rows])
        if text := effort(board):
            self._write(f"  {text}")

    def note(self, text: str, warning: bool = False) -> None:
        self._write(f"{'warning: ' if warning else ''}{figures.clean(text)}")

    def close(self) -> None:
        """Nothing is held open."""

    def _table(self, rows: Sequence[Sequence[str]]) -> None:
        cleaned = [[figures.clean(cell) for cell in row] for row in rows]
        if not cleaned:
            return
        widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
        for row in cleaned:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            self._write(f"  {'  '.join(cells)}".rstrip())

    def _write(self, line: str) -> None:
        """Every line goes through here, and so does every environment's name."""
        line = figures.clean(line)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # A log in an old encoding gets a ? for an arrow, not an exception in the middle of a run.
        line = line.encode(encoding, "replace").decode(encoding)
        self._stream.write(line + "\n")
        self._stream.flush()
