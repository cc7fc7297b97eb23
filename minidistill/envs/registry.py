"""Environments by name: built in, installed as entry points, or `module:function`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.protocol import Environment
from minidistill.errors import UserError

ENTRY_POINTS = "minidistill.environments"
BUILT_IN = {
    "sokoban-env": "minidistill.envs.sokoban:load",
    "jsonl": "minidistill.envs.jsonl:load",
}


def load_environments(configs: Iterable[EnvConfig], where: str) -> dict[str, Environment]:
    """The configured environments by name, in the configuration's order."""
    return {
        config.name: load_environment(config.id, config.args, f"{where}.{index}")
        for index, config in enumerate(configs)
    }


def load_environment(id: str, args: dict[str, Any] | None = None, where: str = "") -> Environment:
    """Build the environment `id`: a built-in name, an entry point's name, or `module:function`.

    Raises UserError, with `where` as its place, if there is no such environment, if it cannot be
    imported, or if it does not take `args`.
    """
    args = args or {}
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if id in BUILT_IN:
        factory = import_function(BUILT_IN[id], where)
    elif id in installed:
        factory = _load_function(id, installed[id].load, where)
    elif ":" in id:
        factory = import_function(id, where)
    else:
        names = ", ".join(sorted({*BUILT_IN, *installed}))
        raise UserError(
            f"unknown environment {id!r}",
            where=where,
            fix=f"use one of {names}, install a package with an entry point in the group "
            f"{ENTRY_POINTS!r}, or write module:function",
        )
    signature = inspect.signature(factory)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise UserError(
            f"environment {id!r} does not take these args: {error}",
            where=where,
            fix=f"its arguments are {signature}",
        ) from None
    environment: Environment = factory(**args)
    return environment


def import_function(path: str, where: str, kind: str = "environment") -> Callable[..., Any]:
    """Import `module:function`. Modules in the current directory are found too.

    Raises UserError if that fails; its message calls the function a `kind`.
    """
    module, _, name = path.partition(":")
    # a console script has its own folder on the path instead
    if (current := os.getcwd()) not in sys.path:
        sys.path.append(current)
    return _load_function(path, lambda: getattr(import_module(module), name), where, kind)


def _load_function(
    path: str, load: Callable[[], Any], where: str, kind: str = "environment"
) -> Callable[..., Any]:
    try:
        function = load()
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot load the {kind} {path!r}: {error}",
            where=where,
            fix="name an importable module and a function in it, as module:function",
        ) from error
    return function
