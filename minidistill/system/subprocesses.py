"""A supervised subprocess: output captured, silence noticed, process group killed on close.

Its process group is killed too when this process ends without `close`, however that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import Any

from minidistill.errors import EXIT_ENVIRONMENT, UserError, printable
from minidistill.system import local_modules

logger = logging.getLogger(__name__)

EXIT_TIMEOUT = 5.0  # seconds that a process gets to exit after it closed its connection
NOTE_SECONDS = 60.0  # of silence, before it is said
TICK = 1.0  # seconds between two looks at something that is silent
OUTPUT_BYTES = 1 << 16  # of a process's output, the end, that is read
LONGEST_OUTPUT = 1 << 26  # bytes of it on disk, before all but that end is dropped
OWN_OUTPUT = "see why it hangs (once the run has begun, logs/run.log gets the end of its output)"
LINE = 300  # characters of its last line in a message
PATHS, LIFELINE = "MINIDISTILL_PATHS", "MINIDISTILL_LIFELINE"
# `python -m` puts the current directory on the path before it runs anything. A subprocess gets
# this process's path instead, the modules that the configuration names in there, and this very
# package. Before its imports, which take seconds, it is bound to this process's life.
START = (
    "import os, runpy, sys; del sys.argv[0]; "
    f"root, *paths = os.environ.pop('{PATHS}').split(os.pathsep); "
    "sys.path[:] = [root]; import minidistill; sys.path[:] = paths; "
    "from minidistill.system.subprocesses import die_with_parent; die_with_parent(); "
    "from minidistill.system import local_modules; local_modules.take_over(); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


class Silence:
    """How long something that is waited for has shown no progress.

    It is said after a minute, and again each time that the silence is twice as long.
    """

    def __init__(self, who: str, limit: float, key: str) -> None:
        """`key` is the setting of the `limit`, in seconds."""
        self.who, self.limit, self.key = who, limit, key
        self.seconds = 0.0
        self._noted = NOTE_SECONDS

    @property
    def tick(self) -> float:
        """Seconds to wait before the next `lasts`."""
        return min(TICK, self.limit / 4)

    def broken(self) -> None:
        """There was progress."""
        self.seconds = 0.0

    def lasts(self, seconds: float, doing: str) -> bool:
        """Add `seconds` of silence. Returns whether the limit is reached.

        They are what was waited, not what a clock says: a run that was suspended goes on.
        """
        self.seconds += seconds
        if self._noted <= self.seconds < self.limit:
            self._noted = 2 * self.seconds
            end = time.strftime("%H:%M:%S", time.localtime(time.time() + self.limit - self.seconds))
            logger.info(
                f"{self.who} has been silent for {self.seconds:.6g} s ({doing}); it is given up at "
                f"{end} ({self.key} = {self.limit:g})"
            )
        return self.seconds >= self.limit

    def error(self, doing: str, last_words: str = "", fix: str = OWN_OUTPUT) -> UserError:
        """The error (exit code 3) of a run that ends because of it."""
        return UserError(
            f"{self.who} was silent for {self.limit:g} s ({doing}), and was given up{last_words}",
            where=self.key,
            fix=f"{fix}; raise {self.key} if it only needs longer. --resume continues from the "
            "last checkpoint",
            exit_code=EXIT_ENVIRONMENT,
        )


def limit_transfers(end: socket.socket, seconds: float) -> None:
    """Have a read or a write fail (BlockingIOError) if the other process stops within a message.

    Part of it has then arrived, or does not fit into the socket's buffer.
    """
    limit = struct.pack("ll", *divmod(round(seconds * 1_000_000), 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)


def die_with_parent() -> None:
    """Have this process's group killed as soon as the process that started it has ended.

    A pipe is closed then, and the kernel sends the signal: it also ends code that never returns to
    the interpreter, which a thread that reads the pipe cannot. Called at the start of a
    `Subprocess`, which leads its group.
    """
    descriptor = int(os.environ.pop(LIFELINE))
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid())  # minus: the group
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:  # closed before
        os.killpg(os.getpid(), signal.SIGKILL)


class Subprocess:
    """`python -m module` as the leader of its own process group.

    Ctrl-C in a terminal is therefore not delivered to it, so a step can finish first. Killing it
    also kills the processes that it started, and so does the end of this process. It imports from
    where this process does: neither it nor what it starts imports from the current directory on its
    own.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        popen: Callable[..., Any] | None = None,
    ) -> None:
        """Start the process, in this folder if one is given.

        It inherits the file `descriptors` under the same numbers, and this process's environment
        variables, updated with `environment`. `popen` may stand in for `subprocess.Popen`.
        """
        root = str(Path(__file__).resolve().parents[2])
        paths = [path or os.getcwd() for path in sys.path]
        watched, lifeline = os.pipe()
        ours = {
            PATHS: os.pathsep.join([root, *paths]),
            LIFELINE: str(watched),
            "PYTHONSAFEPATH": "1",
            **local_modules.variables(),
        }
        # what is on the stack is closed here only if the process does not start
        with open(watched, "rb"), contextlib.ExitStack() as stack:
            self._lifeline = stack.enter_context(open(lifeline, "wb"))
            self._output = stack.enter_context(tempfile.TemporaryFile())
            # shared with the process, which then goes on at the end of what `trim_output` leaves
            fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
            self.popen = (popen or Popen)(
                [sys.executable, "-c", START, module, *arguments],
                pass_fds=[*descriptors, watched],
                stdin=DEVNULL,
                stdout=self._output,
                stderr=STDOUT,
                start_new_session=True,
                cwd=folder,
                env={**os.environ, **(environment or {}), **ours},
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
        return code, cause + self.last_words()

    def last_words(self) -> str:
        """The last line of output, as "; last output: …", or "". The log gets the end of it."""
        if self._output.closed:
            return ""
        text = printable(self.output()).strip()
        if not text:
            return ""
        lines = text.splitlines()
        quoted = "\n".join(f"  | {line}" for line in lines)
        logger.debug(f"the end of the output of process {self.popen.pid}:\n{quoted}")
        return f"; last output: {lines[-1].strip()[:LINE]}"

    def output(self) -> str:
        """The end of what it has printed so far."""
        return self._end_of_output().decode(errors="replace")

    def trim_output(self) -> None:
        """Drop all but the end of a long output, which would fill the disk in a long run."""
        with contextlib.suppress(OSError, ValueError):  # another thread has closed it
            if os.fstat(self._output.fileno()).st_size > LONGEST_OUTPUT:
                end = self._end_of_output()
                self._output.truncate(0)
                os.write(self._output.fileno(), end)

    def _end_of_output(self) -> bytes:
        file = self._output.fileno()
        return os.pread(file, OUTPUT_BYTES, max(0, os.fstat(file).st_size - OUTPUT_BYTES))

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, as Ctrl-Z does."""
        try:
            stat = Path(f"/proc/{self.popen.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "tT"

    def kill(self) -> None:
        """Kill the process and every process in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self, patience: float = 0.0) -> None:
        """Wait up to `patience` seconds for the process to exit, then kill its group."""
        try:
            with contextlib.suppress(TimeoutExpired):
                self.popen.wait(patience)
        finally:
            self.kill()
            self.popen.wait()
            self._output.close()
            self._lifeline.close()
