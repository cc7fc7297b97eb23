"""Reward functions whose exceptions verifiers turns into 0.0: here they are noted.

Which conversation a function was called for is known from a context variable, which asyncio's tasks
and the threads that they start inherit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from minidistill.system.foreign import describe

_errors: ContextVar[list[str] | None] = ContextVar("reward_errors", default=None)
_NOTED = "_minidistill_noted"


@contextmanager
def noted_errors() -> Iterator[list[str]]:
    """A list that gets what reward functions raise meanwhile, each with the function's name."""
    errors: list[str] = []
    token = _errors.set(errors)
    try:
        yield errors
    finally:
        _errors.reset(token)


def rubrics_of(environment: Any) -> Iterator[Any]:
    """All rubrics of an environment: of a group those of its members too."""
    for member in getattr(environment, "env_map", {}).values():
        yield from rubrics_of(member)
    yield from _nested(environment.rubric)


def note_errors(rubric: Any) -> None:
    """Make the functions of a rubric record what they raise, and raise it."""
    rubric.funcs[:] = [f if hasattr(f, _NOTED) else _noting(f) for f in rubric.funcs]


def _nested(rubric: Any) -> Iterator[Any]:
    yield rubric
    for member in getattr(rubric, "rubrics", []):
        yield from _nested(member)


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(function, "__name__", repr(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _noted(name):
            value = function(*args, **kwargs)
            return waiting(value) if inspect.isawaitable(value) else _checked(value)

    async def waiting(value: Awaitable[Any]) -> Any:
        with _noted(name):
            return _checked(await value)

    setattr(call, _NOTED, True)
    with contextlib.suppress(ValueError):  # a function may have none
        # says what it is given: it is asked for many times for each score
        call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


@contextmanager
def _noted(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (errors := _errors.get()) is not None:
            errors.append(f"the reward function {name} raised {describe(error)}")
        raise


def _checked(value: Any) -> Any:
    """The value. Raises what verifiers would raise, and swallow, for one that is no number."""
    if not isinstance(value, list | tuple | dict):
        float(value)
    return value
