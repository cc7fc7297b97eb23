"""Subprocesses forked from one that has imported torch and vLLM, whose import takes seconds.

What tests start in-process, ranks and engines, begins in this way. Runs that tests start as
`python -m minidistill` start theirs as users do.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from typing import Any

import pytest

from minidistill.subprocesses import PATHS, START
from support.paths import TESTS

CONTEXT = multiprocessing.get_context("forkserver")
FREE = 200  # the first of the file descriptors that no test inherits
LIGHT = {"minidistill.envs.worker"}  # modules that are started sooner than forked


def start_server() -> None:
    """Start the process to fork from, if it does not run."""
    CONTEXT.set_forkserver_preload(["support.preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
        forkserver.ensure_running()


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a subprocess, forked if its imports take long."""
    kind: Any = subprocess.Popen if command[3] in LIGHT else ForkedPopen
    return kind(command, **options)


class ForkedPopen:
    """The part of `subprocess.Popen` that `minidistill.subprocesses` uses."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int],
        stdout: Any,
        env: Mapping[str, str],
        stdin: int,
        stderr: int,
        start_new_session: bool,
    ) -> None:
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        assert start_new_session
        python, flag, code, module, *arguments = command
        assert (python, flag, code) == (sys.executable, "-c", START)
        start_server()
        numbers = {number: number for number in pass_fds} | dict.fromkeys((1, 2), stdout.fileno())
        self._process = CONTEXT.Process(
            target=_run_module, args=(module, arguments, dict(env), _Descriptors(numbers))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)  # until it leads its group, which `kill` needs

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self._process.exitcode


class _Descriptors:
    """File descriptors by the number that the subprocess is to have them under."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        return _take, ({number: DupFd(fd) for number, fd in self.numbers.items()},)


def _take(received: Mapping[int, Any]) -> None:
    """Give each descriptor its number, in the subprocess."""
    spare = {n: fcntl.fcntl(fd.detach(), fcntl.F_DUPFD, FREE) for n, fd in received.items()}
    for number, fd in spare.items():
        os.dup2(fd, number)
        os.close(fd)


def _run_module(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], descriptors: None
) -> None:
    """Be `python -m module`, as the leader of a process group. Unpickling took `descriptors`."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = os.environ.pop(PATHS).split(os.pathsep)[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
