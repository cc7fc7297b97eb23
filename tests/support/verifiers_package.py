"""Which version of the package verifiers is installed, and tests that need one."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

try:
    INSTALLED: tuple[int, ...] = tuple(map(int, version("verifiers").split(".")[:2]))
except PackageNotFoundError:
    INSTALLED = ()

needs_classic = pytest.mark.skipif(
    not (0, 1) <= INSTALLED < (0, 4), reason="needs verifiers before 0.4, which is not installed"
)
needs_tasksets = pytest.mark.skipif(
    INSTALLED < (0, 4), reason="needs verifiers from 0.4, which is not installed"
)
needs_either = pytest.mark.skipif(
    not INSTALLED, reason="needs verifiers: pip install 'minidistill[verifiers]'"
)


def guessing(**args: Any) -> dict[str, Any]:
    """The args that load the test's environment, in the installed version."""
    env = "support.verifiers_classic"
    if INSTALLED >= (0, 4):
        env = "verifiers_taskset"
    return {"env": env, "env_args": args}


def give_taskset_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have verifiers find the test's task set: from 0.4 it takes names without dots."""
    if INSTALLED >= (0, 4):
        module = importlib.import_module("support.verifiers_taskset")
        monkeypatch.setitem(sys.modules, "verifiers_taskset", module)
