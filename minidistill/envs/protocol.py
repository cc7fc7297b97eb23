"""The interface of an environment: tasks in two splits, and a score for each completion.

`minidistill/envs/example.py` is a complete environment to copy, with the configuration that uses
it; docs/environments.md explains it. An environment need not live in this package: `id` takes any
`module:function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from minidistill.types import Advance, Reward, Task


class Environment(Protocol):
    """Tasks and their scoring.

    An environment may also have these attributes:

    - `has_rewards = False`: its scores have no meaning. They are not computed.
    - `has_task = False`: its scores are of the style alone.
    - `scores_in_process = True`: `score` is quick and cannot hang, so it needs no process that can
      be stopped: see `IsolatedEnvironment`.
    - `score_all(attempts, report)`: scores many completions at once: see `score_attempts`.
    - `check_ready()`: raises UserError if it cannot score now, because a server is not reached. It
      is called before anything is written.
    - `example_answer(task)`: a completion that deserves the best reward, for `minidistill env
      check`. By default it is the task's answer.
    - `async rollout(task, policy)`, in place of `score`: plays a conversation of several turns. See
      `MultiTurnEnvironment`.
    - `close()`: called at the end of the run, also if that ends before the first step.
    """

    @property
    def train(self) -> Sequence[Task]:
        """Tasks to train on. The sequence may build them lazily; ids are unique."""

    @property
    def eval(self) -> Sequence[Task]:
        """Held-out tasks, with ids that no training task has."""

    def score(self, task: Task, completion: str) -> Reward:
        """Score a completion.

        A number, a bool, or a dict of "reward" and metrics may be returned too: see `to_reward`. An
        exception drops this rollout from the step.
        """


def has_rewards(environment: Environment) -> bool:
    """Whether the environment's scores are meaningful, which is the default."""
    return bool(getattr(environment, "has_rewards", True))


def has_task(environment: Environment) -> bool:
    """Whether the environment's tasks have answers that are right or wrong.

    By default they have if there is a reward. An environment whose reward is of the style alone
    sets `has_task = False`: drift is then judged as for a persona.
    """
    return bool(getattr(environment, "has_task", has_rewards(environment)))


def check_ready(environment: object) -> None:
    """Raise UserError if the environment, or a reward, says that it cannot score now."""
    if (check := getattr(environment, "check_ready", None)) is not None:
        check()


@runtime_checkable
class TasksMadeTogether(Protocol):
    """A split whose tasks take long to make, and that makes several of them faster than one by one.

    A split need not have this method.
    """

    def make_tasks(self, indices: Sequence[int], advance: Advance) -> Sequence[Task]:
        """The tasks of these indices. `advance` is called with the number of tasks just made."""


def take_tasks(
    tasks: Sequence[Task], indices: Sequence[int], advance: Advance = lambda count: None
) -> list[Task]:
    """The tasks of these indices, made together if the split can do that."""
    if isinstance(tasks, TasksMadeTogether):
        return list(tasks.make_tasks(indices, advance))
    taken = []
    for index in indices:
        taken.append(tasks[index])
        advance(1)
    return taken
