"""An environment of somebody else's, whose failures are reported as its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

from minidistill.envs.protocol import Environment
from minidistill.errors import EXIT_FAILED, UserError
from minidistill.system.foreign import describe, foreign_code
from minidistill.types import Advance, Reward, Task

Guard = Callable[[str], AbstractContextManager[None]]
"""Around a part of an environment: what it raises becomes a UserError."""
_FLAGS = ("has_rewards", "has_task", "scores_in_process")


class GuardedEnvironment:
    """Passes everything on to the environment.

    What it raises while its tasks are read, or while it is asked whether it is ready, is a
    UserError that names it. Of its attributes AttributeError stays: it says which are not there.
    Scoring and closing have guards of their own: `score_attempts`, `close_environments`.
    """

    def __init__(self, environment: Environment, id: str, where: str) -> None:
        self.environment, self.id, self.where = environment, id, where
        self._splits: dict[str, Sequence[Task]] = {}

    @property
    def train(self) -> Sequence[Task]:
        return self._split("train")

    @property
    def eval(self) -> Sequence[Task]:
        return self._split("eval")

    def score(self, task: Task, completion: str) -> Reward:
        return self.environment.score(task, completion)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copy and pickle before there is an environment
            raise AttributeError(name)
        with self._guard(f"attribute {name}", AttributeError):
            value: Any = getattr(self.environment, name)
            if name in _FLAGS:
                value = bool(value)
        if name == "check_ready" and value is not None:
            return lambda: self._checked(value)
        return value

    def _split(self, name: str) -> Sequence[Task]:
        if name not in self._splits:
            with self._guard(f"split {name}", AttributeError):
                tasks = getattr(self.environment, name)
            with self._guard(f"split {name}"):
                self._splits[name] = guarded_tasks(
                    tasks, lambda part: self._guard(f"{part} of {name}")
                )
        return self._splits[name]

    def _checked(self, check_ready: Callable[[], object]) -> None:
        with self._guard("check_ready"):
            check_ready()

    def _guard(self, part: str, *ours: type[BaseException]) -> AbstractContextManager[None]:
        def failure(error: BaseException) -> UserError:
            return UserError(
                f"the environment {self.id!r} failed in its {part}: {describe(error)}",
                where=self.where,
                fix="fix the environment; --traceback shows where it was raised",
                exit_code=EXIT_FAILED,
            )

        return foreign_code(failure, ours=(UserError, *ours))


def guarded_tasks(tasks: Sequence[Task], guard: Guard) -> Sequence[Task]:
    """The tasks, read and checked with `guard`. Those of lists and tuples are read at once."""
    if isinstance(tasks, list | tuple):
        with guard("tasks"):
            return [checked_task(task, index) for index, task in enumerate(tasks)]
    kind = _TasksMadeTogether if hasattr(tasks, "make_tasks") else _Tasks
    return kind(tasks, guard)


def checked_task(task: Any, index: object) -> Task:
    """The task, with an id that is plain text or a number: that of another class may hold code.

    Raises TypeError for what is no task, or has messages that no template and no file can take. It
    would fail in the middle of a step.
    """
    if not all(hasattr(task, name) for name in ("id", "messages", "answer")):
        raise TypeError(f"number {index} is no Task, but {type(task).__name__}")
    if not isinstance(task.id, str | int):
        raise TypeError(f"number {index} has an id that is no text, but {type(task.id).__name__}")
    task = _with_plain_id(task)
    check_messages(task.messages, str(task.id))
    context = getattr(task, "context", None)
    if not isinstance(context, str | None):
        raise TypeError(f"the context of {task.id} is no text, but {type(context).__name__}")
    try:
        (context or "").encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"the context of {task.id} cannot be written: {error}") from None
    return task


def check_messages(messages: Any, of: str) -> None:
    """Raise TypeError for messages that no template and no file can take."""
    if not isinstance(messages, list | tuple):
        raise TypeError(f"the messages of {of} are no tuple, but {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message of {of} has no role")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise TypeError(f"a message of {of} has a content that is no text")
    try:
        plain = [dict(message) for message in messages]
        json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"the messages of {of} cannot be written as JSON: {error}") from None


def _with_plain_id(task: Any) -> Any:
    if type(task.id) in (str, int, bool):
        return task
    # by the methods of the plain types: its own may be anything
    plain = str.__str__(task.id) if isinstance(task.id, str) else int.__int__(task.id)
    task = copy(task)
    object.__setattr__(task, "id", plain)  # it may be frozen
    return task


class _Tasks(Sequence[Task]):
    def __init__(self, tasks: Any, guard: Guard) -> None:
        self._tasks, self._guard = tasks, guard

    def __len__(self) -> int:
        with self._guard("length"):
            return len(self._tasks)

    def __getitem__(self, index: Any) -> Any:
        with self._guard(f"task {index}"):
            return checked_task(self._tasks[index], index)

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(len(self)))


class _TasksMadeTogether(_Tasks):
    """A split that has `make_tasks`."""

    def make_tasks(self, indices: Sequence[int], advance: Advance) -> Sequence[Task]:
        with self._guard("make_tasks"):
            tasks = list(self._tasks.make_tasks(indices, advance))
            if len(tasks) != len(indices):
                raise ValueError(f"it made {len(tasks)} of {len(indices)} tasks")
            return [checked_task(t, i) for i, t in zip(indices, tasks, strict=True)]
