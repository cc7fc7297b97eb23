"""Disks that fail at a chosen call, disks that are full, processes that die at a chosen call."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minidistill.errors import UserError

CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
"""The system's calls of Python code that change files, or flush them."""


@contextlib.contextmanager
def at_call(number: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Call `act` in place of the `number`-th of `CALLS`. Yields the calls so far."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            original = getattr(os, name)

            def call(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
                made.append(name)
                if len(made) == number:
                    act()
                return original(*args, **kw)

            patch.setattr(os, name, call)
        yield made


def failing(number: int, error: int) -> contextlib.AbstractContextManager[list[str]]:
    """The `number`-th call fails with an error of the system."""

    def act() -> None:
        raise OSError(error, os.strerror(error))

    return at_call(number, act)


def killed(number: int, body: Callable[[], object]) -> bool:
    """Run `body` in a fork that is killed at the `number`-th call. Whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                body()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def refusal(body: Callable[[], object]) -> UserError | None:
    """The UserError that `body` raises, if it does."""
    try:
        body()
    except UserError as error:
        return error
    return None


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Callable[[int], None]]:
    """A file system in memory at `path`. Yields a function that sets its size in bytes.

    Skips the test where it may not be mounted.
    """
    path.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(command, capture_output=True).returncode == 0
        return False

    if not mount("size=16m"):
        pytest.skip("a file system cannot be mounted here")
    try:
        yield lambda size: None if mount(f"remount,size={size}") else pytest.fail("no remount")
    finally:
        subprocess.run(["umount", str(path)], check=True)
