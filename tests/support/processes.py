"""Runs and servers in subprocesses, and every process that one of them has started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support import forked
from support.gpus import REHEARSED
from support.paths import ROOT, TESTS

MARK = "MINIDISTILL_MARK"
Started = subprocess.Popen[str] | forked.ForkedPopen


def start(
    command: Sequence[str],
    stdout: Any = subprocess.PIPE,
    *,
    as_users_do: bool = False,
    **environment: str,
) -> Started:
    """Start `python -m module` in the repository's root, as the leader of a process group.

    It finds the modules that tests find. It is forked unless it is to start `as_users_do`, with all
    that it starts, or there is a GPU, which a forked process could not use.
    """
    paths = os.pathsep.join([str(TESTS), str(ROOT), *filter(None, sys.path)])
    real = as_users_do or not REHEARSED
    kind: Any = subprocess.Popen if real else forked.ForkedPopen
    return kind(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, start_new_session=True, env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def new_mark() -> str:
    """The value of MARK in the environment of a process and of all that it starts."""
    return str(uuid.uuid4())


def marked(mark: str) -> dict[int, str]:
    """The command lines of the living processes with a mark, by process id."""
    commands = {}
    text = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # a zombie has none
                    commands[int(folder.name)] = command
        except OSError:  # the process ended, or is another user's
            continue
    return commands


def left_behind(mark: str, seconds: float = 10) -> dict[int, str]:
    """The processes with a mark that are still alive after `seconds`."""
    deadline = time.time() + seconds
    while (processes := marked(mark)) and time.time() < deadline:
        time.sleep(0.1)
    return processes
