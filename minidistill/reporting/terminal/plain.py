"""Plain lines for logs and pipes: no escape codes, one line per step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from minidistill.reporting.formatting import (
    clean,
    duration,
    evaluations,
    number,
    signed,
    tokens_per_second,
)
from minidistill.reporting.scoreboard_rows import (
    effort,
    env_rows,
    scoreboard_rows,
    shown_completions,
    verdict,
)
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.reporting.terminal.pace import Pace
from minidistill.types import Advance, Metrics

HEARTBEAT_SECONDS = 30.0
"""A phase that takes longer reports its progress this often, so that a log does not look dead."""

CHARACTERS = 120
"""Of a prompt or completion on the scoreboard."""


class PlainDisplay:
    """Writes whole lines and flushes after each call."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # Warnings come from several threads. Reentrant: a signal handler may write a note.
        self._lock = threading.RLock()
        self._pace = Pace(max_steps=0)

    def open(self, header: Header) -> None:
        self._pace = Pace(header.max_steps)
        lines = [header.title, *_table(header.rows)]
        if header.first_step > 1:
            lines.append(f"  resumed at step {header.first_step}")
        self._write(*lines)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        completed, last_report = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal completed, last_report
            completed += count
            if time.monotonic() - last_report >= HEARTBEAT_SECONDS:
                last_report = time.monotonic()
                self._write(f"  {name} {completed}/{total} {unit}")

        yield advance

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None:
        self._pace.end_step()
        parts = [f"step {step}/{self._pace.max_steps}"]
        loss = "loss/total" if "loss/total" in metrics else "loss/policy"
        for name, key in (("kl", "teacher_kl"), ("reward", "reward/mean"), ("loss", loss)):
            if key in metrics:
                parts.append(f"{name} {number(metrics[key])}")
        rate = tokens_per_second(metrics)
        if rate is not None:
            parts.append(f"{number(rate)} tok/s")
        parts.append(f"eta {duration(self._pace.seconds_left(step))}")
        self._write("  ".join(parts))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for env, scores in evaluations(metrics).items():
            figures = [f"{name} {number(value)}" for name, value in scores.items()]
            self._write("  ".join([f"evaluation at step {step}", env, *figures]))
        if (kl := metrics.get("eval/heldout_kl")) is not None:
            self._write(f"evaluation at step {step}  held-out KL {number(kl)}")
        self._pace.start_step()

    def baseline(self, metrics: Metrics) -> None:
        rows = [("baseline", "student", "teacher", "difference")]
        for env, scores in evaluations(metrics).items():
            student, teacher = scores.get("baseline_student"), scores.get("baseline_teacher")
            difference = signed(scores.get("baseline_diff"))
            rows.append((env, number(student), number(teacher), difference))
        self._write(*_table(rows))
        self._pace.start_step()

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        lines = [f"scoreboard  {board.get('env') or ''}".rstrip()]
        lines.append(f"  {verdict(board)}")
        lines += _table(scoreboard_rows(board))
        if rows := env_rows(board):
            lines += _table([("environment", "before", "after", "teacher", "gap closed"), *rows])
        for shown in shown_completions(board, CHARACTERS):
            lines.append(f"  held-out prompt: {shown.prompt}")
            texts = (("before", shown.before), ("teacher", shown.teacher), ("after", shown.after))
            lines += _table([("  " + name, text) for name, text in texts])
        if text := effort(board):
            lines.append(f"  {text}")
        self._write(*lines)

    def note(self, text: str, warning: bool = False) -> None:
        self._write(f"{'warning: ' if warning else ''}{text}")

    def close(self) -> None:
        """There is nothing to release."""

    def _write(self, *lines: str) -> None:
        """All output goes through here, so that names from files and models are cleaned."""
        text = "".join(clean(line) + "\n" for line in lines)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # In an old encoding an arrow becomes a ?, which is better than an exception amid a run.
        text = text.encode(encoding, "replace").decode(encoding)
        with self._lock:
            self._stream.write(text)
            self._stream.flush()


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented lines with aligned columns."""
    cleaned = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
    lines = []
    for row in cleaned:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
