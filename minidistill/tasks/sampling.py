"""Drawing the tasks of each step, and a fingerprint of all tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

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

    def __init__(
        self,
        environments: Mapping[str, Environment],
        seed: int,
        tasks: Mapping[str, Sequence[Task]] | None = None,
    ) -> None:
        """`tasks` has those to draw, by environment; by default all of their training splits."""
        self.seed = seed
        self.tasks = tasks or {name: env.train for name, env in environments.items()}
        sizes = [len(tasks) for tasks in self.tasks.values()]
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
        return self._take([self._task_index(i) for i in range((step - 1) * count, step * count)])

    def replacements(
        self, step: int, attempt: int, environments: Sequence[str]
    ) -> list[tuple[str, Task]]:
        """A random task of each of these environments, which may name one several times.

        For tasks of a step that cannot be used. They depend on the seed, the step and the `attempt`
        alone.
        """
        rng = np.random.default_rng(stable_seed(self.seed, "replacement", step, attempt))
        names = list(self.tasks)
        places = [names.index(name) for name in environments]
        return self._take([int(rng.integers(self.starts[i], self.starts[i + 1])) for i in places])

    def _take(self, numbers: Sequence[int]) -> list[tuple[str, Task]]:
        """The tasks of these numbers among all, each with its environment's name."""
        drawn: dict[int, tuple[str, Task]] = {}
        for env, (name, split) in enumerate(self.tasks.items()):
            first, end = int(self.starts[env]), int(self.starts[env + 1])
            own = [number for number in numbers if first <= number < end]
            tasks = take_tasks(split, [number - first for number in own])
            drawn |= {number: (name, task) for number, task in zip(own, tasks, strict=True)}
        return [drawn[number] for number in numbers]

    def _task_index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if self._order[0] != epoch:
            rng = np.random.default_rng(stable_seed(self.seed, "epoch", epoch))
            self._order = (epoch, rng.permutation(len(self)))
        return int(self._order[1][offset])


class Fingerprint:
    """A hash of the numbers of tasks, and of the ids, token ids and answers of prompts."""

    def __init__(self, environments: Mapping[str, Environment]) -> None:
        sizes = [[name, len(e.train), len(e.eval)] for name, e in environments.items()]
        self._hash = hashlib.sha256(f"[{json.dumps(sizes)}, [".encode())
        self._separator = ""

    def add(self, prompt: Prompt) -> None:
        task = prompt.task
        content = [prompt.env, task.id, prompt.student_ids, prompt.teacher_ids, task.answer]
        # an answer that is not plain data counts by its type, the same in every process
        text = json.dumps(content, skipkeys=True, default=lambda value: type(value).__name__)
        self._hash.update((self._separator + text).encode())
        self._separator = ", "

    def hexdigest(self) -> str:
        whole = self._hash.copy()
        whole.update(b"]]")
        return whole.hexdigest()
