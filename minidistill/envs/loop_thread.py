"""An asyncio loop in a thread of its own, which can be left behind if something blocks it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

logger = logging.getLogger(__name__)
GRACE = 1.0
"""Seconds for what is still running when the loop is closed."""


class LoopThread:
    """Runs coroutines, and knows for how long each of them has run.

    Other people's coroutines share the loop. One that does not return to it stops all the others,
    which is no fault of theirs: `Clock` leaves that time out.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: logger.debug(context["message"]))
        self.busy = 0.0
        """Seconds in which a coroutine with a clock ran, up to its last return to the loop."""
        self.running: tuple[Clock, float] | None = None
        """The clock of the coroutine that runs now, and since when."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"environment {name}", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, None], clock: Clock) -> Callable[[], None]:
        """Run a coroutine. Returns a function that cancels it. Thread-safe."""
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            tasks.append(self.loop.create_task(_timed(coroutine, clock)))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        self.call(begin)
        return lambda: self.call(cancel)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop's thread; nothing happens if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def leave(self) -> None:
        """Have the loop end as soon as nothing blocks it, without waiting for that."""
        self._closed = True
        self.call(self.loop.stop)

    def close(self) -> None:
        """End the loop and cancel what still runs. A blocked loop is abandoned."""
        self.leave()
        self._thread.join(2 * GRACE)
        if self._thread.is_alive():
            logger.warning("a conversation of an environment still runs, and is left behind")

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._closed:
            try:
                self.loop.run_forever()
            except BaseException as error:  # sys.exit in a task that an environment started
                logger.debug("a task of an environment stopped its loop", exc_info=error)
        with contextlib.suppress(BaseException):
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=GRACE))
        with contextlib.suppress(BaseException):
            self.loop.close()


class Clock:
    """The time of one coroutine in a loop, less the time in which others kept the loop."""

    def __init__(self, thread: LoopThread) -> None:
        self.thread = thread
        self.own = 0.0
        """Seconds in which it ran since the start, up to its last return to the loop."""
        self._began = self._busy = 0.0
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.own, self._busy, self._began = 0.0, self.thread.busy, time.monotonic()

    def seconds(self) -> float:
        """Since the start, from any thread."""
        now, running = time.monotonic(), self.thread.running
        others = self.thread.busy - self._busy - self.own
        if running is not None and running[0] is not self:
            others += now - max(running[1], self._began)
        return max(0.0, now - self._began - max(0.0, others))

    @property
    def blocks(self) -> bool:
        """Whether it runs now and has not returned to the loop."""
        running = self.thread.running
        return running is not None and running[0] is self


class _Steps:
    """Awaits a coroutine and counts the time of each of its steps."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], clock: Clock) -> None:
        self.coroutine, self.clock = coroutine, clock

    def __await__(self) -> Generator[Any, Any, None]:
        step: Callable[[Any], Any] = self.coroutine.send
        value: Any = None
        while True:
            try:
                yielded = self._timed(step, value)
            except StopIteration:
                return
            try:
                step, value = self.coroutine.send, (yield yielded)
            except BaseException as error:
                step, value = self.coroutine.throw, error

    def _timed(self, step: Callable[[Any], Any], value: Any) -> Any:
        thread, began = self.clock.thread, time.monotonic()
        thread.running = self.clock, began
        try:
            return step(value)
        finally:
            seconds = time.monotonic() - max(began, self.clock._began)
            thread.busy += seconds
            self.clock.own += seconds
            thread.running = None


async def _timed(coroutine: Coroutine[Any, Any, None], clock: Clock) -> None:
    await _Steps(coroutine, clock)
