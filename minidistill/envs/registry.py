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


Factory = Callable[..., "Environment"]


def load_environments(configs: Iterable[EnvConfig], where: str) -> dict[str, Environment]:
    """Environments by name, in the configuration's order."""
    return {
        config.name: load_environment(config.id, config.args, f"{where}.{index}")
        for index, config in enumerate(configs)
    }


def load_environment(id: str, args: dict[str, Any] | None = None, where: str = "") -> Environment:
    """Build an environment by a built-in id, an entry point's name, or a `module:function` path.

    Raises UserError for an unknown id, a path that does not import, or arguments it refuses.
    """
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if id in BUILT_IN:
        factory = import_function(BUILT_IN[id], where)
    elif id in installed:
        factory = _load(id, installed[id].load, where)
    elif ":" in id:
        factory = import_function(id, where)
    else:
        known = ", ".join(sorted({*BUILT_IN, *installed}))
        raise UserError(
            f"unknown environment {id!r}",
            where=where,
            fix=f"use one of {known}, install a package with an entry point in the group "
            f"{ENTRY_POINTS!r}, or write module:function",
        )
    try:
        inspect.signature(factory).bind(**(args or {}))
    except TypeError as error:
        raise UserError(
            f"environment {id!r} does not take these args: {error}",
            where=where,
            fix=f"its arguments are {inspect.signature(factory)}",
        ) from None
    return factory(**(args or {}))


def import_function(path: str, where: str, what: str = "environment") -> Callable[..., Any]:
    """What `module:function` names, looked for in the current directory too.

    Raises UserError, which calls it `what`, where it is none.
    """
    module, _, name = path.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as of a console script
        sys.path.append(here)
    return _load(path, lambda: getattr(import_module(module), name), where, what)


def _load(
    path: str, load: Callable[[], Any], where: str, what: str = "environment"
) -> Callable[..., Any]:
    try:
        found = load()
        if not callable(found):
            raise TypeError(f"{found!r} is no function")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot load the {what} {path!r}: {error}",
            where=where,
            fix="name an importable module and a function in it, as module:function",
        ) from error
    return found
