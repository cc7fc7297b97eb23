"""The driver's side of vLLM's process: starting it, calling it, restarting it when it dies.

A process that is alive and does nothing is not restarted: it ends the run (`silence`).
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import multiprocessing
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minidistill.config.schema import SILENCE, SilenceConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.system.scratch import ScratchFolder, use_for_multiprocessing
from minidistill.system.subprocesses import Silence, Subprocess, limit_transfers
from minidistill.trainer.guards import first_line, says_out_of_memory

logger = logging.getLogger(__name__)
MODULE = "minidistill.engines.vllm.worker"
T = TypeVar("T")
Report = Callable[[Any], None]
# What vLLM says if its share of the GPU is too small, or is not free
TOO_LITTLE = (
    "No available memory for the cache blocks",
    "less than desired GPU memory utilization",
)


COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def _compiled() -> dict[str, str]:
    """Where torch keeps compiled code: where it would without a temporary folder of its own.

    Not if somebody else can write there: torch runs what it finds.
    """
    if COMPILED in os.environ:
        return {}
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.geteuid())
    path = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if ours and not status.st_mode & stat.S_IWOTH:
            return {COMPILED: str(path)}
    logger.warning(f"{path} is not this user's alone: compiled code is not kept there")
    return {}


class EngineDied(Exception):
    """The engine's process has ended. The message is its exit report."""


class EngineFailed(Exception):
    """The engine's process is alive and reports an error."""


class EngineProcess(Subprocess):
    """The subprocess and two sockets to it: one for calls, one for commands during a call.

    If the driver dies without `close`, the subprocess is killed. Its temporary files and shared
    memory are then left for the next run to remove.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        silence: SilenceConfig = SILENCE,
    ) -> None:
        self._silence = silence
        self._silent: UserError | None = None  # why it was killed
        use_for_multiprocessing()
        self._scratch = ScratchFolder()
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        descriptors = [end.fileno() for end in theirs]
        places = {}
        if self._scratch.holds_sockets:
            places = {"TMPDIR": str(self._scratch.path), **_compiled()}
        try:
            super().__init__(
                MODULE, [*map(str, descriptors)], descriptors, {**environment, **places}
            )
        except BaseException:
            self._scratch.close()
            for end in ours:
                end.close()
            raise
        finally:
            for end in theirs:
                end.close()
        for end in ours:
            limit_transfers(end, silence.step)
        self._calls, self._commands = (Connection(end.detach()) for end in ours)
        # shared memory handles are exchanged under this key
        key = bytes(multiprocessing.current_process().authkey)
        with contextlib.suppress(OSError):  # if it has died, the first call reports it
            self._calls.send((key, dict(options)))

    def wait_until_started(self) -> None:
        """Wait for the engine to be built. Raises EngineDied, EngineFailed, or UserError."""
        waited = Silence(self._name, self._silence.load, "silence.load")
        self._receive(self._calls, None, "starting", waited)
        self._scratch.remember_segments(self.popen.pid)

    def call(self, method: str, report: Report | None = None, **arguments: Any) -> Any:
        """Call a method of `EngineWorker` and return its result. One call at a time.

        `report` is called with what the method reports before it returns. Raises UserError (exit
        code 3) if the process is silent for too long; it is then killed.
        """
        self._send(self._calls, method, arguments)
        return self._receive(self._calls, report, *self._running(method))

    def command(self, method: str, **arguments: Any) -> Any:
        """Like `call`, but handled between two steps of a call that is in progress."""
        return self.start_command(method, **arguments)()

    def start_command(self, method: str, **arguments: Any) -> Callable[[], Any]:
        """Start a command. Returns the function that waits for its result."""
        self._send(self._commands, method, arguments)
        return lambda: self._receive(self._commands, None, *self._running(method))

    @property
    def _name(self) -> str:
        return f"vLLM's process ({self.popen.pid})"

    def _running(self, method: str) -> tuple[str, Silence]:
        return f"running `{method}`", Silence(self._name, self._silence.step, "silence.step")

    def _send(self, connection: Connection, method: str, arguments: dict[str, Any]) -> None:
        try:
            connection.send((method, arguments))
        except BlockingIOError:
            self._give_up(*self._running(method))
        except OSError as error:
            raise self._silent or EngineDied(self.exit_report()[1]) from error

    def _receive(
        self, connection: Connection, report: Report | None, doing: str, silence: Silence
    ) -> Any:
        while True:
            try:
                if not connection.poll(silence.tick):
                    if silence.lasts(silence.tick, doing):
                        self._give_up(doing, silence)
                    continue
                kind, value = connection.recv()
            except BlockingIOError:
                self._give_up(doing, silence)
            except (EOFError, OSError) as error:
                raise self._silent or EngineDied(self.exit_report()[1]) from error
            silence.broken()
            self.trim_output()
            if kind == "report":
                if report is not None and value is not None:  # None: it goes on
                    report(value)
            elif kind == "failed":
                raise EngineFailed(value)
            else:
                return value

    def _give_up(self, doing: str, silence: Silence) -> NoReturn:
        stopped = ", stopped by a signal" if self.is_stopped() else ""
        self._silent = silence.error(doing, stopped + self.last_words())
        self.kill()
        raise self._silent

    def close(self, patience: float = 0.0) -> None:
        self._scratch.remember_segments(self.popen.pid)
        super().close(patience)
        self._scratch.close()
        self._calls.close()
        self._commands.close()


class RestartingProcess:
    """Restarts a dead process and retries the call, up to `max_restarts` times a run.

    The process is started at once and waited for at the first call. `on_start` sends a new process
    the current weights. Two threads may call: one that samples, one that sends commands meanwhile.
    """

    def __init__(
        self, start: Callable[[], EngineProcess], on_start: Callable[[], None], max_restarts: int
    ) -> None:
        self._start, self._on_start = start, on_start
        self.max_restarts = max_restarts
        self.restarts = 0
        self.ready = self._closed = False
        self._lock = threading.RLock()  # held while starting or restarting
        self.process = start()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function`, which calls `process`, and again after a restart. Returns its result.

        Raises UserError if the process cannot be restarted, or reports an error.
        """
        while True:
            process = self.process
            try:
                with self._lock:
                    if not self.ready:
                        self.process.wait_until_started()
                        self.ready = True
                        self._on_start()
                return function()
            except EngineFailed as error:
                raise self._failure(str(error)) from error
            except EngineDied as death:
                with self._lock:
                    if self.process is process:  # else another thread has restarted it
                        self._restart(death)

    def _failure(self, message: str) -> UserError:
        """The error for an error that the process reports."""
        memory = says_out_of_memory(message) or any(text in message for text in TOO_LITTLE)
        fix = 'see the message; inference.engine = "embedded" does without vLLM'
        if memory:
            fix = (
                "lower orchestrator.sampling.max_tokens or seq_len, give the engine another share "
                "of the GPU (inference.gpu_memory_utilization), or more GPUs. `minidistill plan` "
                "shows what needs memory"
            )
        return UserError(
            f"vLLM: {first_line(message)}",
            where="inference.gpu_memory_utilization" if memory else "inference.engine",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT if memory or not self.ready else EXIT_FAILED,
        )

    def _restart(self, death: EngineDied) -> None:
        self.process.close()
        if self._closed or self.restarts >= self.max_restarts:
            times = f" and was restarted {self.restarts} times" if self.restarts else ""
            raise UserError(
                f"vLLM's process died{times}: {death}",
                where="inference.max_restarts",
                fix="check whether memory ran out; --resume continues from the last checkpoint",
                exit_code=EXIT_ENVIRONMENT,
            ) from death
        self.restarts += 1
        logger.warning(f"vLLM's process died ({death}): restarted with the current weights")
        self.ready = False
        self.process = self._start()

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self.process.close()
