"""What an environment is: tasks in two splits, and a score for a completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

from minidistill.errors import UserError
from minidistill.types import Reward, Task

ENTRY_POINTS = "minidistill.environments"
BUILT_IN = {"sokoban-env": "minidistill.envs.sokoban:load"}


Factory = Callable[..., "Environment"]


class Environment(Protocol):
    """Tasks and scoring.

    `train` and `eval` are sequences of tasks; generating them lazily is welcome. A task's id is
    unique within the environment. `score` may raise: that drops the one rollout.
    """

    train: Sequence[Task]
    eval: Sequence[Task]

    def score(self, task: Task, completion: str) -> Reward: ...


def load_environment(id: str, args: dict[str, Any] | None = None, where: str = "") -> Environment:
    """Build an environment by a built-in id, an entry point's name, or a `module:function` path.

    Raises UserError for an unknown id, a path that does not import, or arguments it refuses.
    """
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if id in BUILT_IN:
        factory = _import(BUILT_IN[id], where)
    elif id in installed:
        factory = _load(id, installed[id].load, where)
    elif ":" in id:
        factory = _import(id, where)
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


def _import(path: str, where: str) -> Factory:
    module, _, name = path.partition(":")
    return _load(path, lambda: getattr(import_module(module), name), where)


def _load(path: str, load: Callable[[], Any], where: str) -> Factory:
    try:
        factory = load()
        if not callable(factory):
            raise TypeError(f"{factory!r} is no function")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot load the environment {path!r}: {error}",
            where=where,
            fix="name an importable module and a function in it, as module:function",
        ) from error
    return factory
