"""An interrupt at any moment: also while the thread that it interrupts writes."""

from __future__ import annotations

import io
import logging
import signal
import threading
from typing import Any

from minidistill.driver import loop


def test_an_interrupt_may_come_in_the_middle_of_a_write(monkeypatch: Any) -> None:
    interrupt, written, told = loop.Interrupt(), bytearray(), threading.Event()

    class Output(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if not interrupt.requested:
                interrupt.handle(signal.SIGINT, None)
            written.extend(data)
            return len(data)

    output = io.BufferedWriter(Output())

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            output.write(record.getMessage().encode())
            output.flush()
            told.set()

    monkeypatch.setattr(loop.logger, "handlers", [Handler()])
    output.write(b"step 1/")
    output.flush()
    assert interrupt.requested
    assert told.wait(10)
    assert written.startswith(b"step 1/stopping after this step")
