"""Drawing the tasks of each step, and a fingerprint of all tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minidistill.envs.protocol import Environment, take_tasks
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.types import Prompt, Task

ROUND = 1000
"""Draws of a round with weights, for each environment."""
Array = np.ndarray[Any, Any]


class TaskSampler:
    """Draws each training task once an epoch, in a random order.

    With weights, each round of draws has a fixed number of tasks of each environment, spread over
    it, and an environment's own tasks are drawn once before one of them comes again.

    The tasks of a step depend on the seed and the step's number alone, so a resumed run draws the
    tasks that the uninterrupted run would have drawn.
    """

    def __init__(
        self,
        environments: Mapping[str, Environment],
        seed: int,
        tasks: Mapping[str, Sequence[Task]] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`tasks` has those to draw, by environment; by default all of their training splits.

        `weights` are the environments' shares of what is drawn; by default their numbers of tasks.
        """
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
        self._orders: dict[str, tuple[int, Array]] = {}
        self._quotas = None if weights is None else _quotas([weights[n] for n in self.tasks])
        nothing: Array = np.empty(0, dtype=np.int64)
        self._round = (-1, nothing, nothing)

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
        if self._quotas is None:
            return self._shuffled(position, len(self), "epoch")
        size = int(self._quotas.sum())
        number, offset = divmod(position, size)
        if self._round[0] != number:
            rng = np.random.default_rng(stable_seed(self.seed, "mix", number))
            # those of each environment are spread over the round, so that each step has its part
            places = [(np.arange(quota) + rng.random(quota)) / quota for quota in self._quotas]
            envs = np.repeat(np.arange(len(self._quotas)), self._quotas)
            envs = envs[np.argsort(np.concatenate(places), kind="stable")]
            ranks = np.zeros(size, dtype=np.int64)  # of each draw among those of its environment
            for env, quota in enumerate(self._quotas):
                ranks[envs == env] = np.arange(quota)
            self._round = (number, envs, ranks)
        env, rank = int(self._round[1][offset]), int(self._round[2][offset])
        first, size = int(self.starts[env]), int(self.starts[env + 1] - self.starts[env])
        own_position = number * int(self._quotas[env]) + rank
        return first + self._shuffled(own_position, size, f"epoch of {[*self.tasks][env]}")

    def _shuffled(self, position: int, size: int, what: str) -> int:
        """What is at a position if all of `size` come once in each epoch."""
        epoch, offset = divmod(position, size)
        known, order = self._orders.get(what, (-1, None))
        if known != epoch or order is None:
            rng = np.random.default_rng(stable_seed(self.seed, what, epoch))
            self._orders[what] = epoch, (order := rng.permutation(size))
        return int(order[offset])


def _quotas(weights: Sequence[float]) -> Array:
    """How many draws of a round each environment has: at least one, and as near as possible to its
    share."""
    total = ROUND * len(weights)
    shares = np.asarray(weights, dtype=float) / np.sum(weights) * total
    quotas = np.maximum(np.floor(shares), 1).astype(np.int64)
    while (rest := total - int(quotas.sum())) != 0:
        # the one that lacks most gets one more, or the one that has most too much one less
        lacking = shares - quotas
        lacking[(quotas <= 1) & (rest < 0)] = np.inf
        quotas[int(np.argmax(lacking) if rest > 0 else np.argmin(lacking))] += np.sign(rest)
    return quotas


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
