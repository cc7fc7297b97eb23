"""Plain lines for logs and pipes: no escape codes, one line per step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
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
from minidistill.system.symbols import ascii_symbols, encodable
from minidistill.types import Advance, Metrics

HEARTBEAT_SECONDS = 30.0
"""After so long without a line a phase's progress is written, so that a log does not look dead."""
SHORTEST_WAIT = 0.02
"""Seconds between two looks at the phases."""

CHARACTERS = 120
"""Of a prompt or completion on the scoreboard."""


@dataclass(slots=True)
class _Phase:
    """A phase that has not ended."""

    name: str
    total: int
    unit: str
    began: float
    completed: int = 0

    def progress(self, now: float) -> str:
        """What is done, since when, and how long the rest takes."""
        seconds = now - self.began
        done = "" if self.total == 1 else f" {self.completed}/{self.total} {self.unit}"
        text = f"{self.name}{done}" + (f"  for {duration(seconds)}" if seconds >= 1 else "")
        if not 0 < self.completed < self.total:
            return text
        return f"{text}  eta {duration(seconds * (self.total / self.completed - 1))}"


class PlainDisplay:
    """Writes whole lines and flushes after each call. A thread says which phase takes long."""

    def __init__(self, stream: TextIO, *, in_ascii: bool = False) -> None:
        self._stream, self._in_ascii = stream, in_ascii
        # Warnings come from several threads. Reentrant: a signal handler may write a note.
        self._lock = threading.RLock()
        self._pace = Pace(max_steps=0)
        self._phases: list[_Phase] = []
        self._last_line = time.monotonic()
        self._heartbeat: threading.Thread | None = None
        self._closed = threading.Event()

    def open(self, header: Header) -> None:
        self._pace = Pace(header.max_steps, eval_interval=header.eval_interval)
        self._pace.replay(header.history)
        lines = [header.title, *self._table(header.rows)]
        if header.first_step > 1:
            lines.append(f"  resumed at step {header.first_step}")
        self._write(*lines)
        self._pace.start_step()

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        phase = _Phase(name, total, unit, time.monotonic())

        def advance(count: int) -> None:
            phase.completed += count

        with self._lock:
            self._phases.append(phase)
        self._start_heartbeat()
        try:
            yield advance
        finally:
            with self._lock:
                self._phases.remove(phase)

    def _start_heartbeat(self) -> None:
        if self._heartbeat is None and not self._closed.is_set():
            self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            with suppress(RuntimeError):  # no more threads: the run goes on without it
                self._heartbeat.start()

    def _beat(self) -> None:
        while not self._closed.wait(max(SHORTEST_WAIT, self._silence_left())):
            with self._lock:
                if self._phases and self._silence_left() <= 0:
                    now = time.monotonic()
                    self._write("  " + "; ".join(phase.progress(now) for phase in self._phases))

    def _silence_left(self) -> float:
        return self._last_line + HEARTBEAT_SECONDS - time.monotonic()

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
            if (seconds := metrics.get("time/eval", 0.0)) >= 1:
                figures.append(f"in {duration(seconds)}")
            self._write("  ".join([f"evaluation at step {step}", env, *figures]))
        if (kl := metrics.get("eval/heldout_kl")) is not None:
            self._write(f"evaluation at step {step}  held-out KL {number(kl)}")
        self._end_evaluation(step, metrics)

    def baseline(self, metrics: Metrics) -> None:
        rows = [("baseline", "student", "teacher", "difference")]
        for env, scores in evaluations(metrics).items():
            student, teacher = scores.get("baseline_student"), scores.get("baseline_teacher")
            difference = signed(scores.get("baseline_diff"))
            rows.append((env, number(student), number(teacher), difference))
        if len(rows) > 1:
            self._write(*self._table(rows))
        self._end_evaluation(0, metrics)

    def _end_evaluation(self, step: int, metrics: Metrics) -> None:
        self._pace.evaluated(step, metrics.get("time/eval"))
        self._pace.start_step()

    def checkpoint(self, step: int, path: Path) -> None:
        """A step has one line."""

    def scoreboard(self, board: Mapping[str, Any]) -> None:
        lines = [f"scoreboard  {board.get('env') or ''}".rstrip()]
        lines.append(f"  {verdict(board)}")
        lines += self._table(scoreboard_rows(board))
        if rows := env_rows(board):
            lines += self._table(
                [("environment", "before", "after", "teacher", "gap closed"), *rows]
            )
        for shown in shown_completions(board, CHARACTERS):
            lines.append(f"  held-out prompt: {shown.prompt}")
            texts = (("before", shown.before), ("teacher", shown.teacher), ("after", shown.after))
            lines += self._table([("  " + name, text) for name, text in texts])
        if text := effort(board):
            lines.append(f"  {text}")
        self._write(*lines)

    def note(self, text: str, warning: bool = False) -> None:
        self._write(f"{'warning: ' if warning else ''}{text}")

    def end(self, exit_code: int, directory: Path) -> None:
        """The scoreboard has said it."""

    def close(self) -> None:
        """End the thread. It writes no line after this."""
        with self._lock:
            self._closed.set()

    def _write(self, *lines: str) -> None:
        """All output goes through here, so that names from files and models are cleaned."""
        text = "".join(self._text(line) + "\n" for line in lines)
        with self._lock:
            self._last_line = time.monotonic()
            self._stream.write(text)
            self._stream.flush()

    def _text(self, text: object) -> str:
        """One line of safe text, as the stream can show it."""
        line = clean(text)
        return encodable(ascii_symbols(line) if self._in_ascii else line, self._stream)

    def _table(self, rows: Sequence[Sequence[str]]) -> list[str]:
        """Indented lines with aligned columns."""
        cleaned = [[self._text(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cleaned, strict=True)]
        lines = []
        for row in cleaned:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        return lines
