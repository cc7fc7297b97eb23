"""A thread between the run and a monitor, so that a slow or broken one costs the run nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from minidistill.errors import printable
from minidistill.reporting.monitors import Monitor
from minidistill.types import Metrics

CAPACITY = 1000
"""Records that wait while the monitor is busy; what comes on top is dropped and counted."""
CLOSE_SECONDS = 10.0
"""The longest that `close` waits for the monitor to take what is left."""


class Background:
    """Hands metrics to a monitor in a daemon thread, which also opens it.

    A warning is kept until the run's own thread calls `log` or `close`: a display need not be
    safe to call from elsewhere. Of each kind there is one.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Monitor],
        warn: Callable[[str], None],
        capacity: int = CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.dropped = 0
        self._name, self._connect, self._warn = name, connect, warn
        self._close_seconds = close_seconds
        # Room for one more than the records: the end must fit into a queue that is full.
        self._capacity = capacity
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(capacity + 1)
        self._summary: Mapping[str, Any] | None = None
        self._warnings: deque[str] = deque()
        self._warned: set[str] = set()
        self._closed = False
        self._dead = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"monitor {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        self._pass_on_warnings()
        if self._closed or self._dead.is_set():
            return
        if self._queue.qsize() >= self._capacity:
            self.dropped += 1
            self._complain("slow", "does not keep up: records are dropped")
            return
        self._queue.put_nowait((step, dict(metrics)))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self._closed:
            return
        self._closed, self._summary = True, summary
        began = time.monotonic()
        self._queue.put_nowait(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            waited = time.monotonic() - began
            self._complain("close", f"was not done {waited:.0f} s after the end: not waited for")
        if self.dropped:
            self._complain("dropped", f"{self.dropped} records were dropped")
        self._pass_on_warnings()

    def _work(self) -> None:
        try:
            monitor = self._connect()
        except Exception as error:
            self._dead.set()
            self._complain("connect", f"is off: {_reason(error)}")
            return
        while (record := self._queue.get()) is not None:
            try:
                monitor.log(*record)
            except Exception as error:
                # Counted with the dropped ones; the next record may get through again.
                self.dropped += 1
                self._complain("log", f"failed: {_reason(error)}")
        try:
            monitor.close(self._summary)
        except Exception as error:
            self._complain("end", f"failed at the end: {_reason(error)}")

    def _complain(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warnings.append(f"{self._name} {text}; the run and metrics.jsonl are unaffected")

    def _pass_on_warnings(self) -> None:
        while self._warnings:
            self._warn(self._warnings.popleft())


def _reason(error: Exception) -> str:
    lines = printable(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
