"""Environments that fail. Configurations name them as `support.broken_envs:crashing`."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.envs import Environment, load_environment
from minidistill.types import Reward, Task


class Crashing:
    """Sokoban whose scoring raises for every `every`-th training task."""

    def __init__(self, inner: Environment, every: int) -> None:
        self.inner, self.every = inner, every
        self.train: Sequence[Task] = inner.train
        self.eval: Sequence[Task] = inner.eval

    def score(self, task: Task, completion: str) -> Reward:
        split, number = task.id.split("/")
        if split == "train" and int(number) % self.every == 0:
            raise ZeroDivisionError("the reward \x1b[31mcrashed")
        return self.inner.score(task, completion)


def crashing(every: int, **args: object) -> Crashing:
    return Crashing(load_environment("sokoban-env", dict(args)), every)


class Empty:
    """An environment without tasks."""

    train: Sequence[Task] = ()
    eval: Sequence[Task] = ()

    def score(self, task: Task, completion: str) -> Reward:
        return Reward(0.0)


def empty() -> Empty:
    return Empty()
