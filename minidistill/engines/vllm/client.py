"""An engine in a process of its own: started, spoken to, and never left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from minidistill.subprocesses import Child
from minidistill.types import Advance

MODULE = "minidistill.engines.vllm.worker"


class EngineDied(Exception):
    """The engine's process has ended; the text says how."""


class EngineFailed(Exception):
    """The engine's process lives and reports an error."""


class EngineProcess(Child):
    """The child and two sockets to it: for calls, and for commands in the middle of a call.

    Should this process die without closing, the child sees its end of a pipe close and ends its
    group itself.
    """

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        watched, self._lifeline = os.pipe()
        descriptors = (*(end.fileno() for end in theirs), watched)
        try:
            super().__init__(MODULE, [*map(str, descriptors)], descriptors, environment)
        finally:
            for end in theirs:
                end.close()
            os.close(watched)
        self.connection, self._commands = (Connection(end.detach()) for end in ours)
        # handles of shared memory are fetched under this key
        key = bytes(multiprocessing.current_process().authkey)
        with contextlib.suppress(OSError):  # its death is met at the first call
            self.connection.send((key, dict(options)))

    def receive(self, advance: Advance | None = None, on: Connection | None = None) -> Any:
        """The answer to what was sent last. Raises EngineDied or EngineFailed."""
        while True:
            try:
                kind, value = (on or self.connection).recv()
            except (EOFError, OSError) as error:
                raise EngineDied(self.obituary()[1]) from error
            if kind == "progress":
                if advance is not None:
                    advance(value)
            elif kind == "failed":
                raise EngineFailed(value)
            else:
                return value

    def call(self, method: str, advance: Advance | None = None, **arguments: Any) -> Any:
        """Have the engine do something and return its answer. One call at a time."""
        return self._ask(self.connection, method, arguments, advance)

    def command(self, method: str, **arguments: Any) -> Any:
        """The same, done between two steps of a call that another thread is waiting for."""
        return self._ask(self._commands, method, arguments, None)

    def _ask(
        self, on: Connection, method: str, arguments: dict[str, Any], advance: Advance | None
    ) -> Any:
        try:
            on.send((method, arguments))
        except OSError as error:
            raise EngineDied(self.obituary()[1]) from error
        return self.receive(advance, on)

    def close(self, patience: float = 0.0) -> None:
        super().close(patience)
        self.connection.close()
        self._commands.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
