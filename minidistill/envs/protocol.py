"""What an environment is: tasks in two splits, and a score for a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minidistill.types import Reward, Task


class Environment(Protocol):
    """Tasks and scoring.

    `train` and `eval` are sequences of tasks; generating them lazily is welcome. A task's id is
    unique within the environment. `score` may raise: that drops the one rollout. An environment
    that sets `has_rewards = False` has no scores to speak of: none is trained on or shown.
    """

    train: Sequence[Task]
    eval: Sequence[Task]

    def score(self, task: Task, completion: str) -> Reward: ...


def has_rewards(environment: Environment) -> bool:
    """Whether its scores mean anything: not where it says `has_rewards = False`."""
    return bool(getattr(environment, "has_rewards", True))
