"""Programs of the user's, each ended with all that it has started: the run's side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.envs.outcomes import ScoringError
from minidistill.errors import printable

logger = logging.getLogger(__name__)
SCRIPT = Path(__file__).with_name("supervise.py")
GRACE_SECONDS = 0.5
"""Between SIGTERM and SIGKILL."""
END_SECONDS = 5.0
"""That all processes of a program get to end, when the run ends."""
ERROR_BYTES = 1 << 14
"""Of a program's standard error, the end, that is kept."""
PIPE_BYTES = 1 << 16
LINE = 300  # characters of its last line in a message


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    output: int
    """Bytes of standard output and standard error together."""
    processes: int
    """A process and its descendants."""
    memory: int
    """Bytes in memory, of all of them."""


class Program:
    """One program that has been started."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None,
        limits: Limits,
    ) -> None:
        """Start it. Raises OSError."""
        self.limits = limits
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        numbers = [theirs.fileno(), limits.processes, limits.memory, GRACE_SECONDS]
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT), *map(str, numbers), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd=folder,
                env=dict(environment),
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()

    async def output(self) -> str:
        """Wait for its end. Returns what it has written to standard output.

        Raises ScoringError, with its kind, if it fails or exceeds a limit; it is ended then.
        """
        loop = asyncio.get_running_loop()
        written, errors, total = bytearray(), bytearray(), 0

        async def read(pipe: Any, kept: bytearray, most: int) -> None:
            nonlocal total
            reader = asyncio.StreamReader(limit=PIPE_BYTES)
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await loop.connect_read_pipe(lambda: protocol, pipe)
            try:
                while part := await reader.read(PIPE_BYTES):
                    total += len(part)
                    if total > self.limits.output:
                        what = f"it wrote more than {self.limits.output} bytes (max_output)"
                        raise ScoringError(what, kind="flooded")
                    kept += part
                    del kept[:-most]
            finally:
                transport.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(read(self.popen.stdout, written, self.limits.output))
            group.create_task(read(self.popen.stderr, errors, ERROR_BYTES))
        report = json.loads(await self._report() or "{}")
        text = written.decode(errors="replace")
        if report != {"exit": 0}:
            raise self._failure(report, _quoted(bytes(errors) or bytes(written[-ERROR_BYTES:])))
        return text

    async def _report(self) -> str:
        loop, parts = asyncio.get_running_loop(), b""
        with contextlib.suppress(OSError):
            while part := await loop.sock_recv(self.socket, 1 << 12):
                parts += part
        return parts.decode(errors="replace")

    def _failure(self, report: Mapping[str, int], last_words: str) -> ScoringError:
        match report:
            case {"exit": code}:
                what, kind = f"its program ended with exit code {code}", "crashed"
            case {"signal": number}:
                name = signal.Signals(number).name
                what, kind = f"its program was ended by {name}", "crashed"
            case {"processes": count}:
                most = self.limits.processes
                what = f"its program had {count} processes, more than {most} (max_processes)"
                kind = "processes"
            case {"memory": size}:
                allowed, used = self.limits.memory / (1 << 30), size / (1 << 30)
                what = f"its program used {used:.2f} GiB, more than {allowed:g} (max_memory)"
                kind = "memory"
            case _:
                what, kind = "its program was ended", "crashed"
        return ScoringError(what + last_words, kind=kind)

    def end(self) -> None:
        """Have it ended, with SIGTERM and then SIGKILL, without waiting for that."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    async def wait(self) -> None:
        """Wait until it and all that it has started have ended."""
        while self.popen.poll() is None:
            await asyncio.sleep(0.01)
        self.socket.close()

    def close(self) -> None:
        """End it and wait, in another thread than that of the loop."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_SECONDS)
        if self.popen.poll() is None:
            logger.warning(f"process {self.popen.pid} does not end its program")
            self.popen.kill()
            self.popen.wait()
        self.socket.close()


class Programs:
    """The programs that run now."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._running: set[Program] = set()

    async def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path | None,
        started: Callable[[Program], object],
    ) -> str:
        """Run a program to its end, with only these environment variables, in a folder.

        Returns its standard output. `started` is called with it. If this is cancelled, it is ended.
        Raises ScoringError, as `Program.output`.
        """
        try:
            program = Program(command, environment, folder, self.limits)
        except OSError as error:
            raise ScoringError(f"its program cannot be started: {error}", kind="crashed") from None
        self._running.add(program)
        try:
            started(program)
            return await program.output()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            program.end()
            await program.wait()
            self._running.discard(program)

    def close(self) -> None:
        """End all of them."""
        running = list(self._running)
        for program in running:
            program.end()
        for program in running:
            program.close()


def _quoted(output: bytes) -> str:
    """The last line of a program's output, as "; last output: …", or ""."""
    text = printable(output.decode(errors="replace")).strip()
    if not text:
        return ""
    lines = text.splitlines()
    logger.debug("the end of a program's output:\n" + "\n".join(f"  | {line}" for line in lines))
    return f"; last output: {lines[-1].strip()[:LINE]}"
