"""Drawing the tasks of each step, and a fingerprint of all tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np

from minidistill.envs.protocol import Environment, take_tasks
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.types import Prompt, Task


class TaskSampler:
    """Draws each training task once an epoch, in a random order.

    The tasks of a step depend on the seed and the step's number alone, so a resumed run draws the
    tasks that the uninterrupted run would have drawn.
    """

    def __init__(self, environments: Mapping[str, Environment], seed: int) -> None:
        self.environments, self.seed = environments, seed
        sizes = [len(environment.train) for environment in environments.values()]
        self.starts = np.cumsum([0, *sizes])  # index of its first task among all
        if not len(self):
            raise UserError(
                "the environments have no training tasks",
                where="orchestrator.env",
                fix="raise the number of training examples in their args",
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def draw(self, step: int, count: int) -> list[tuple[str, Task]]:
        """The `count` tasks of a step, each with its environment's name. Steps count from 1."""
        numbers = [self._task_index(i) for i in range((step - 1) * count, step * count)]
        drawn: dict[int, tuple[str, Task]] = {}
        for env, (name, environment) in enumerate(self.environments.items()):
            first, end = int(self.starts[env]), int(self.starts[env + 1])
            own = [number for number in numbers if first <= number < end]
            tasks = take_tasks(environment.train, [number - first for number in own])
            drawn |= {number: (name, task) for number, task in zip(own, tasks, strict=True)}
        return [drawn[number] for number in numbers]

    def _task_index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if self._order[0] != epoch:
            rng = np.random.default_rng(stable_seed(self.seed, "epoch", epoch))
            self._order = (epoch, rng.permutation(len(self)))
        return int(self._order[1][offset])


def fingerprint(environments: Mapping[str, Environment], prompts: Iterable[Prompt]) -> str:
    """A hash of the number of tasks, and of the ids, token ids and answers of `prompts`."""
    sizes = [[name, len(e.train), len(e.eval)] for name, e in environments.items()]
    contents = [[p.env, p.task.id, p.student_ids, p.teacher_ids, p.task.answer] for p in prompts]
    # an answer that is not plain data counts by its type, which is the same in every process
    text = json.dumps([sizes, contents], skipkeys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()
