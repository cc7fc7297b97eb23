"""Subprocesses forked from one that has imported torch and vLLM, whose import takes seconds.

What tests start begins in this way: whole runs, vLLM servers, and the ranks and engines of both.
Some start as users start them: one run with ranks, one with an engine, those with `torchrun`, those
of tests/test_lost_output.py, which are about the end of the interpreter, and a few others.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, process
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import torch

from minidistill.system import local_modules, subprocesses
from minidistill.system.subprocesses import LIFELINE, PATHS, START, die_with_parent
from support.paths import TESTS

CONTEXT = multiprocessing.get_context("forkserver")
FREE = 200  # the first of the file descriptors that no test inherits
LIGHT = {
    "minidistill.envs.task_rows",
    "minidistill.envs.worker",
}  # modules that are started sooner than forked


def start_server() -> None:
    """Start the process to fork from, if it does not run."""
    CONTEXT.set_forkserver_preload(["support.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a subprocess, forked if its imports take long."""
    ours = command[1:3] == ["-c", START]  # a `Subprocess`, which is `python -m` in other words
    if ours and command[3] in LIGHT:
        return subprocess.Popen(command, **options)
    return ForkedPopen([command[0], "-m", *command[3:]] if ours else command, **options)


class ForkedPopen:
    """The part of `subprocess.Popen` that `minidistill.system.subprocesses` and the tests use.

    It is for `python -m module`, without input, and with errors in the output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: Any,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stderr: int = subprocess.STDOUT,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
        text: bool = True,
        start_new_session: bool = True,
    ) -> None:
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        assert text or stdout != subprocess.PIPE
        assert list(command[:2]) == [sys.executable, "-m"]
        start_server()
        self.stdout: IO[str] | None = None
        with contextlib.ExitStack() as stack:
            if stdout == subprocess.PIPE:
                reading, writing = os.pipe()
                self.stdout = os.fdopen(reading)
                stack.callback(os.close, writing)
            else:
                writing = stdout.fileno()
            numbers = {number: number for number in pass_fds} | dict.fromkeys((1, 2), writing)
            self._process = CONTEXT.Process(
                target=_run_module,
                args=(list(command), dict(env or os.environ), cwd, _Descriptors(numbers)),
            )
            self._process.start()
        process._children.discard(self._process)  # type: ignore[attr-defined]  # nobody waits
        assert self._process.pid is not None
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)  # until it leads its group, which `kill` needs

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Descriptors:
    """File descriptors by the number that the subprocess is to have them under."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        return dict, ({number: DupFd(fd) for number, fd in self.numbers.items()},)


def _take(received: Mapping[int, Any]) -> None:
    """Give each descriptor its number, in the subprocess."""
    spare = {n: fcntl.fcntl(fd.detach(), fcntl.F_DUPFD, FREE) for n, fd in received.items()}
    for number, fd in spare.items():
        os.dup2(fd, number)
        os.close(fd)


def _run_module(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | None,
    descriptors: Mapping[int, Any],
) -> None:
    """Be `python -m module`, as the leader of a process group."""
    _take(descriptors)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which what was preloaded may have looked up
    paths = os.environ.pop(PATHS, "")
    _appear_as(command, dict(os.environ))
    if threads := environment.get("OMP_NUM_THREADS"):  # which torch read as the server started
        torch.set_num_threads(int(threads))
    if cwd:
        os.chdir(cwd)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if paths:
        sys.path[:] = paths.split(os.pathsep)[1:]
        local_modules.take_over()
    else:
        sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    _, _, module, *arguments = command
    sys.argv = [module, *arguments]
    # what it starts itself is forked from the same server
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore
    subprocesses.Popen = popen  # type: ignore
    os.setsid()
    if LIFELINE in os.environ:
        die_with_parent()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _appear_as(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Have /proc show this process's command and environment, and not those of the server.

    Tests find processes by both. What was added to the environment last comes first, because the
    memory that the kernel reads has the size of the server's.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    command_start, command_end, environment_start, environment_end = map(int, fields[45:49])
    variables = [f"{name}={value}" for name, value in reversed(environment.items())]
    for start, end, texts in (
        (command_start, command_end, command),
        (environment_start, environment_end, variables),
    ):
        data = "\0".join(texts).encode()[: end - start - 1]
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)
