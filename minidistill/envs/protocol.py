"""The interface of an environment: tasks in two splits, and a score for each completion.

`minidistill/envs/example.py` is a complete environment to copy, with the configuration that uses
it. An environment need not live in this package: `id` takes any `module:function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minidistill.types import Reward, Task


class Environment(Protocol):
    """Tasks and their scoring.

    An environment without a meaningful score sets `has_rewards = False`; its scores are then
    neither trained on nor reported. One whose score is of the style alone sets `has_task = False`.
    """

    @property
    def train(self) -> Sequence[Task]:
        """Tasks to train on. The sequence may build them lazily; ids are unique."""

    @property
    def eval(self) -> Sequence[Task]:
        """Held-out tasks, with ids that no training task has."""

    def score(self, task: Task, completion: str) -> Reward:
        """Score a completion. An exception drops this rollout from the step."""


def has_rewards(environment: Environment) -> bool:
    """Whether the environment's scores are meaningful, which is the default."""
    return bool(getattr(environment, "has_rewards", True))


def has_task(environment: Environment) -> bool:
    """Whether the environment's tasks have answers that are right or wrong.

    By default they have if there is a reward. An environment whose reward is of the style alone
    sets `has_task = False`: drift is then judged as for a persona.
    """
    return bool(getattr(environment, "has_task", has_rewards(environment)))
