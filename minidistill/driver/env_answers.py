"""Answers that `minidistill env check` gives: an environment's own ones for a task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from minidistill.envs.isolated import IsolatedEnvironment
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.errors import EXIT_FAILED, UserError
from minidistill.system.foreign import describe, foreign_code
from minidistill.types import Task


def gives_examples(environment: Any) -> bool:
    return getattr(_inner(environment), "example_answer", None) is not None


def own_answer(environment: Any, task: Task) -> str | None:
    """A completion with the task's own answer, None if there is none."""
    answers = own_answers(environment, task)
    return answers[0] if answers else None


def own_answers(environment: Any, task: Task) -> Sequence[str]:
    """The task's own answers in the turns of a conversation, the last of them in all further turns.

    Empty if there is none.
    """
    if gives_examples(environment):
        with foreign_code(partial(_failed, task)):
            example = _inner(environment).example_answer(task)
        return [example] if isinstance(example, str) else list(example or [])
    plain = isinstance(task.answer, str | int | float) and not isinstance(task.answer, bool)
    return [str(task.answer)] if plain else []


def _inner(environment: Any) -> Any:
    wrapped = isinstance(environment, IsolatedEnvironment | MultiTurnEnvironment)
    return environment.environment if wrapped else environment


def _failed(task: Task, error: BaseException) -> UserError:
    return UserError(
        f"the environment failed in example_answer of {task.id}: {describe(error)}",
        where="orchestrator.env",
        fix="fix the environment; --traceback shows where it was raised",
        exit_code=EXIT_FAILED,
    )
