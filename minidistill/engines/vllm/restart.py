"""An engine's process that is started again when it dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from minidistill.engines.vllm.client import EngineDied, EngineFailed, EngineProcess
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError

Warn = Callable[[str], None]


class KeptAlive:
    """Starts the process at once, waits for it at the first question, and again at most
    `max_restarts` times in a run after it has died. `prepare` gives a new one what it needs.

    Two threads may ask: one that waits for a call, one that sends commands meanwhile.
    """

    def __init__(
        self,
        start: Callable[[], EngineProcess],
        prepare: Callable[[], None],
        max_restarts: int,
        warn: Warn,
    ) -> None:
        self._start, self._prepare = start, prepare
        self.max_restarts, self.warn = max_restarts, warn
        self.restarts = 0
        self.ready = self._closed = False
        self._life = threading.RLock()  # starting, and starting again
        self.process = start()

    def ask(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, done again where the process dies of it or meanwhile.

        Raises UserError where it cannot be had.
        """
        while True:
            process = self.process
            try:
                with self._life:
                    if not self.ready:
                        self.process.receive()
                        self.ready = True
                        self._prepare()
                return act()
            except EngineFailed as error:
                raise UserError(
                    f"vLLM: {str(error).strip().splitlines()[0]}",
                    where="inference.engine",
                    fix='look at the message; inference.engine = "embedded" does without vLLM',
                    exit_code=EXIT_FAILED if self.ready else EXIT_ENVIRONMENT,
                ) from error
            except EngineDied as death:
                with self._life:
                    if self.process is process:  # else another thread has seen to it
                        self._restart(death)

    def _restart(self, death: EngineDied) -> None:
        self.process.close()
        if self._closed or self.restarts >= self.max_restarts:
            times = f" and was started again {self.restarts} times" if self.restarts else ""
            raise UserError(
                f"vLLM's process died{times}: {death}",
                where="inference.max_restarts",
                fix="see whether memory ran out; --resume goes on from the last checkpoint",
                exit_code=EXIT_ENVIRONMENT,
            ) from death
        self.restarts += 1
        self.warn(f"vLLM's process died ({death}): started again with the current weights")
        self.ready = False
        self.process = self._start()

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self.process.close()
