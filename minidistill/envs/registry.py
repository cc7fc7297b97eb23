"""Environments by name: built in, installed as entry points, or `module:function`."""

from __future__ import annotations

import difflib
import inspect
import os
import reprlib
import traceback
from collections.abc import Callable, Collection, Iterable
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from minidistill.envs.guarded import GuardedEnvironment
from minidistill.envs.isolated import IsolatedEnvironment, close_environments
from minidistill.envs.multi_turn import MultiTurnEnvironment, drives_turns
from minidistill.envs.protocol import Environment, has_rewards
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.system.foreign import describe, foreign_code
from minidistill.system.local_modules import find_in_current_directory

if TYPE_CHECKING:
    from minidistill.config.orchestrator import EnvConfig

ENTRY_POINTS = "minidistill.environments"
BUILT_IN = {
    "sokoban-env": "minidistill.envs.sokoban:load",
    "frozen-lake-env": "minidistill.envs.frozen_lake:load",
    "jsonl": "minidistill.envs.jsonl:load",
    "dataset": "minidistill.envs.jsonl:load",
    "self-prompts": "minidistill.envs.self_prompts:load",
    "questions": "minidistill.envs.questions:load",
    "reasoning-gym": "minidistill.envs.reasoning_gym:load",
    "textarena": "minidistill.envs.text_arena:load",
    "verifiers": "minidistill.envs.verifiers:load",
    "agent": "minidistill.envs.agent:load",
}


def load_environments(configs: Iterable[EnvConfig], where: str) -> dict[str, Environment]:
    """The configured environments by name, in the configuration's order.

    Those whose scoring may hang or exit score in a process of their own. If one cannot be loaded,
    the others are closed.
    """
    environments: dict[str, Environment] = {}
    try:
        for index, config in enumerate(configs):
            environments[config.name] = _load(config, f"{where}.{index}")
    except BaseException:
        close_environments(environments.values())
        raise
    return environments


def _load(config: EnvConfig, place: str) -> Environment:
    environment = load_environment(config.id, config.args, place)
    with foreign_code(partial(_failed, config.id, place)):
        turns = drives_turns(environment)
        needed = ("train", "eval", "rollout" if turns else "score")
        missing = [name for name in needed if not hasattr(environment, name)]
    if missing:
        close_environments([environment])
        raise UserError(
            f"the environment {config.id!r} returned {_short(environment)}, which has no "
            f"{' and no '.join(missing)}",
            where=place,
            fix="return an object with train, eval and score, or with an async rollout in place of "
            "score: see docs/environments.md",
        )
    if config.id not in BUILT_IN:
        environment = GuardedEnvironment(environment, config.id, place)
    if turns:
        limits = config.turn_timeout, config.episode_timeout
        return MultiTurnEnvironment(environment, config.id, *limits)
    in_process = getattr(environment, "scores_in_process", False) or not has_rewards(environment)
    if in_process or config.score_timeout == "off":
        return environment
    return IsolatedEnvironment(environment, config.id, config.args, config.score_timeout, place)


def load_environment(id: str, args: dict[str, Any] | None = None, where: str = "") -> Environment:
    """Build the environment `id`: a built-in name, an entry point's name, or `module:function`.

    Raises UserError, with `where` as its place, if there is no such environment, if it cannot be
    imported, if it does not take `args`, or if it raises an exception.
    """
    args = args or {}
    installed = _installed()
    if id in BUILT_IN:
        factory = import_function(BUILT_IN[id], where)
    elif id in installed:
        factory = _load_function(id, installed[id].load, where)
    elif ":" in id:
        factory = import_function(id, where)
    else:
        names = sorted({*BUILT_IN, *installed})
        raise UserError(
            f"unknown environment {id!r}",
            where=where,
            fix=f"{did_you_mean(id, names)}use one of {', '.join(names)}, install a package with "
            f"an entry point in the group {ENTRY_POINTS!r}, or write module:function",
        )
    _check_args(id, factory, args, where)
    with foreign_code(partial(_failed, id, where)):
        environment: Environment = factory(**args)
    return environment


def known_environments() -> set[str]:
    """The names of environments: built in, and installed."""
    return {*BUILT_IN, *_installed()}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _failed(id: str, where: str, error: BaseException) -> UserError:
    return UserError(
        f"the environment {id!r} failed: {describe(error)}{_raised_at(error)}",
        where=where,
        fix="fix its function or its args; --traceback shows where it was raised",
        exit_code=_exit_code(error),
    )


def _check_args(id: str, factory: Callable[..., Any], args: dict[str, Any], where: str) -> None:
    """Raise UserError if the factory does not take `args`."""
    signature = signature_of(factory)
    if signature is None:
        return
    try:
        signature.bind(**args)
    except TypeError as error:
        unknown = [name for name in args if name not in signature.parameters]
        close = _closest(unknown[0], signature.parameters) if unknown else None
        raise UserError(
            f"environment {id!r} does not take these args: {error}",
            where=where,
            fix=(f"did you mean {close!r}? " if close else "") + arguments(id, signature),
        ) from None


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a user's function, None for one without, which may be written in C."""
    try:
        with foreign_code(lambda error: ValueError(describe(error))):
            return inspect.signature(function)
    except ValueError:
        return None


def arguments(name: str, signature: inspect.Signature) -> str:
    """Which arguments `name` takes, as a sentence: first those that it needs."""
    kept = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_POSITIONAL}
    optional = [n for n, p in kept.items() if p.default is not p.empty]
    optional += ["others" for p in kept.values() if p.kind is p.VAR_KEYWORD]
    needed = [n for n, p in kept.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    parts = [f"takes {', '.join(needed)}"] if needed else []
    parts += [f"may take {', '.join(optional)}"] if optional else []
    return f"{name} {' and '.join(parts) or 'takes no arguments'}"


def did_you_mean(name: str, names: Collection[str]) -> str:
    """A question that names the one of `names` most similar to an unknown one, or ""."""
    close = _closest(name, names)
    return f"did you mean {close!r}? Or " if close else ""


def _closest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` most similar to an unknown one, if one is similar."""
    by_spelling = {known.replace("_", "-"): known for known in names}
    close = difflib.get_close_matches(name.replace("_", "-"), by_spelling, n=1)
    return by_spelling[close[0]] if close else None


def import_function(path: str, where: str, kind: str = "environment") -> Callable[..., Any]:
    """Import `module:function`. A module in the current directory is found too, after all others.

    Raises UserError if that fails; its message calls the function a `kind`.
    """
    module, _, name = path.partition(":")

    def load() -> Any:
        find_in_current_directory(module.partition(".")[0])
        return getattr(import_module(module), name)

    return _load_function(path, load, where, kind)


def _load_function(
    path: str, load: Callable[[], Any], where: str, kind: str = "environment"
) -> Callable[..., Any]:
    def failure(error: BaseException) -> UserError:
        return UserError(
            f"cannot load the {kind} {path!r}: {describe(error)}{_raised_at(error)}",
            where=where,
            fix="name an importable module and a function in it, as module:function",
        )

    with foreign_code(failure, ours=()):
        function = load()
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
    return function


def _short(value: object) -> str:
    """`value` in a few words: its `repr` may be long, or fail."""
    try:
        with foreign_code(lambda error: ValueError(describe(error))):
            return reprlib.repr(value)
    except ValueError:
        return f"a {type(value).__name__}"


def _raised_at(error: BaseException) -> str:
    """The line of someone else's file that raised `error`, as " (file:line)", or ""."""
    if isinstance(error, SyntaxError):
        return ""  # its message has it
    frames = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(os.path.dirname(__file__))
    for frame in reversed(frames):
        if frame.filename.startswith("<") or frame.filename.startswith(own):
            continue
        if "importlib" not in frame.filename:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def _exit_code(error: BaseException) -> int:
    """Missing packages and memory are the machine's fault, all else the configuration's."""
    missing = isinstance(error, ModuleNotFoundError | MemoryError)
    return EXIT_ENVIRONMENT if missing else EXIT_USAGE
