"""A supervised subprocess: output captured, process group killed on close."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

EXIT_TIMEOUT = 5.0  # seconds that a process gets to exit after it closed its connection


def die_with_parent(descriptor: int) -> None:
    """Have this process's group killed as soon as the other end of the pipe `descriptor` is closed.

    The kernel sends the signal, so it also ends code that never returns to the interpreter, which a
    thread that reads the pipe cannot. The process leads its group, as a `Subprocess` does.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid())  # minus: the group
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:  # closed before
        os.killpg(os.getpid(), signal.SIGKILL)


class Subprocess:
    """`python -m module` as the leader of its own process group.

    Ctrl-C in a terminal is therefore not delivered to it, so a step can finish first. Killing it
    also kills the processes that it started.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        It inherits the file `descriptors` under the same numbers, and this process's environment
        variables, updated with `environment`.
        """
        with contextlib.ExitStack() as stack:  # closed here only if the process does not start
            self._output = stack.enter_context(tempfile.TemporaryFile())
            self.popen = Popen(
                [sys.executable, "-m", module, *arguments],
                pass_fds=descriptors,
                stdin=DEVNULL,
                stdout=self._output,
                stderr=STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
            stack.pop_all()

    def exit_report(self) -> tuple[int | None, str]:
        """The exit code and a description with the last line of output.

        The code is None if the process is still running, negative if a signal ended it. After
        `close` there is no output any more.
        """
        try:
            code = self.popen.wait(timeout=EXIT_TIMEOUT)
        except TimeoutExpired:
            return None, "it closed its connection"
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self._output.closed:
            return code, cause
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return code, f"{cause}; last output: {lines[-1].strip()[:300]}" if lines else cause

    def kill(self) -> None:
        """Kill the process and every process in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self, patience: float = 0.0) -> None:
        """Wait up to `patience` seconds for the process to exit, then kill its group."""
        with contextlib.suppress(TimeoutExpired):
            self.popen.wait(patience)
        self.kill()
        self.popen.wait()
        self._output.close()
