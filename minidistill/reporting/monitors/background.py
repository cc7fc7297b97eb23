"""A thread between the run and a monitor, so that a slow or broken one costs the run nothing."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minidistill.errors import printable
from minidistill.reporting.monitors.base import Monitor, Sample
from minidistill.system.foreign import describe
from minidistill.types import Metrics

logger = logging.getLogger(__name__)

CAPACITY = 1000
"""Records that may wait while the monitor is busy; more are dropped and counted."""
THREAD = "monitor "
"""The names of the threads begin with it."""
CLOSE_SECONDS = 10.0
"""How long `close` waits for the monitor to process the remaining records."""


def is_busy() -> bool:
    """Whether the thread of a monitor still runs, as one that was abandoned does."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


class BackgroundMonitor:
    """Opens a monitor in a daemon thread and passes metrics to it there.

    Each kind of failure is logged once, as a warning.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Monitor],
        capacity: int = CAPACITY,
        close_seconds: float | None = None,
    ) -> None:
        self.dropped = 0
        self._name, self._connect = name, connect
        self._close_seconds = CLOSE_SECONDS if close_seconds is None else close_seconds
        # The queue has room for one more entry, so that the end fits in when it is full.
        self._capacity = capacity
        self._queue: queue.Queue[Callable[[Monitor], None] | None] = queue.Queue(capacity + 1)
        self._summary: Mapping[str, Any] | None = None
        self._warned: set[str] = set()
        self._closed = False
        self._failed = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{THREAD}{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        record = dict(metrics)
        self._put(lambda monitor: monitor.log(step, record))

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        record = [dict(row) for row in rows]
        self._put(lambda monitor: monitor.samples(step, record))

    def _put(self, record: Callable[[Monitor], None]) -> None:
        if self._closed or self._failed.is_set():
            return
        if self._queue.qsize() >= self._capacity:
            self.dropped += 1
            self._warn("slow", "does not keep up: records are dropped")
            return
        self._queue.put_nowait(record)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self._closed:
            return
        self._closed, self._summary = True, summary
        start = time.monotonic()
        self._queue.put_nowait(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._abandoned.set()
            seconds = time.monotonic() - start
            self._warn("close", f"was still busy {seconds:.0f} s after the end and was abandoned")
        if self.dropped:
            self._warn("dropped", f"{self.dropped} records were dropped")

    def _work(self) -> None:
        try:
            monitor = self._connect()
        except BaseException as error:
            self._failed.set()
            self._warn_of_error("connect", "is off", error)
            return
        while (record := self._queue.get()) is not None:
            try:
                record(monitor)
            except BaseException as error:
                # The next record may get through again.
                self.dropped += 1
                self._warn_of_error("log", "failed", error)
        try:
            monitor.close(self._summary)
        except BaseException as error:
            self._warn_of_error("end", "failed at the end", error)

    def _warn_of_error(self, kind: str, what: str, error: BaseException) -> None:
        # An abandoned monitor may fail when the run and its display are long gone.
        if self._abandoned.is_set():
            return
        self._warn(kind, f"{what}: {next(iter(printable(describe(error)).splitlines()), '')}")

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(f"{self._name} {text}; the run and metrics.jsonl are unaffected")
