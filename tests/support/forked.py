"""Subprocesses of tests, forked from one that has imported torch and vLLM.

What tests start begins in this way: whole runs, vLLM servers, and the ranks and engines of both.
Some start as users start them: one run with ranks, one with an engine, those with `torchrun`, those
of tests/test_lost_output.py, which are about the end of the interpreter, and a few others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from minidistill.system.subprocesses import START
from support.paths import TESTS
from tools import forked

LIGHT = {
    "minidistill.envs.task_rows",
    "minidistill.envs.worker",
}  # modules that are started sooner than forked


def start_server() -> None:
    """Start the process to fork from, if it does not run."""
    forked.start_server(["support.preload"], [str(TESTS), *sys.path])


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a subprocess, forked if its imports take long."""
    if command[1:3] == ["-c", START] and command[3] in LIGHT:
        return subprocess.Popen(command, **options)
    return ForkedPopen(command, **options)


class ForkedPopen(forked.ForkedPopen):
    """`popen` starts what it starts itself."""

    nested = staticmethod(popen)

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        start_server()
        super().__init__(command, **options)
