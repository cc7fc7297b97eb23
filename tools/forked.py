"""Subprocesses forked from one that has made its imports, which take seconds."""

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
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, process
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from minidistill.system import local_modules, subprocesses
from minidistill.system.subprocesses import LIFELINE, PATHS, START, die_with_parent

CONTEXT = multiprocessing.get_context("forkserver")
SERVER_LOST = 255  # the exit code that multiprocessing gives once the server was killed
FREE = 200  # the first of the file descriptors that no subprocess inherits


def start_server(
    preload: Sequence[str], paths: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Start the process to fork from, if it does not run.

    It imports the modules to `preload`, found on these `paths`. It has this process's environment
    variables, updated with `environment`: torch reads some of them as it is imported.
    """
    CONTEXT.set_forkserver_preload(list(preload))
    ours = {**(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class ForkedPopen:
    """The part of `subprocess.Popen` that `minidistill.system.subprocesses` uses, and tests do.

    It is for `python -m module`, without input, and with errors in the output. Start the server
    first.
    """

    nested: ClassVar[Callable[..., Any] | None] = None
    """In place of `Popen` in what is forked: how that starts its subprocesses."""

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
        if command[1:3] == ["-c", START]:  # a `Subprocess`, which is `python -m` in other words
            command = [command[0], "-m", *command[3:]]
        assert list(command[:2]) == [sys.executable, "-m"]
        self.stdout: IO[str] | None = None
        with contextlib.ExitStack() as stack:
            if stdout == subprocess.PIPE:
                reading, writing = os.pipe()
                self.stdout = os.fdopen(reading)
                stack.callback(os.close, writing)
            else:
                writing = stdout.fileno()
            numbers = {number: number for number in pass_fds} | dict.fromkeys((1, 2), writing)
            environment = dict(env or os.environ)
            self._process = CONTEXT.Process(
                target=_run_module,
                args=(list(command), environment, cwd, _Descriptors(numbers), type(self).nested),
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
        code = self._process.exitcode
        return -signal.SIGKILL if code == SERVER_LOST else code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

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
    nested: Callable[..., Any] | None,
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
    if nested is not None:  # forked from the same server, which this process cannot start
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore
        subprocesses.Popen = nested  # type: ignore
    os.setsid()
    if LIFELINE in os.environ:
        die_with_parent()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _appear_as(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Have /proc show this process's command and environment, and not those of the server.

    One finds processes by both. What was added to the environment last comes first, because the
    memory that the kernel reads has the size of the server's.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    command_start, command_end, environment_start, environment_end = map(int, fields[45:49])
    variables = [f"{name}={value}" for name, value in reversed([*environment.items()])]
    for start, end, texts in (
        (command_start, command_end, command),
        (environment_start, environment_end, variables),
    ):
        data = "\0".join(texts).encode()[: end - start - 1]
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)
