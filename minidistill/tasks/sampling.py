"""Which tasks a step trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np

from minidistill.envs.protocol import Environment
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.types import Prompt, Task


class TaskSampler:
    """Every training task once an epoch, in an order that the seed and the epoch decide.

    What a step gets depends on its number alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, environments: Mapping[str, Environment], seed: int) -> None:
        self.environments, self.seed = environments, seed
        self.starts = np.cumsum([0, *(len(e.train) for e in environments.values())])
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
        """The tasks of a step counted from 1, each with its environment's name."""
        names = list(self.environments)
        drawn = []
        for position in range((step - 1) * count, step * count):
            index = self._index(position)
            which = int(np.searchsorted(self.starts, index, side="right")) - 1
            task = self.environments[names[which]].train[index - int(self.starts[which])]
            drawn.append((names[which], task))
        return drawn

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if self._order[0] != epoch:
            rng = np.random.default_rng(stable_seed(self.seed, "epoch", epoch))
            self._order = (epoch, rng.permutation(len(self)))
        return int(self._order[1][offset])


def fingerprint(environments: Mapping[str, Environment], prompts: Iterable[Prompt]) -> str:
    """A hash of how many tasks there are, and of what `prompts` ask and are scored by."""
    sizes = [[name, len(e.train), len(e.eval)] for name, e in environments.items()]
    said = [[p.env, p.task.id, p.student_ids, p.teacher_ids, p.task.answer] for p in prompts]
    # of an answer that is no plain data only its kind is sure to be the same in every process
    text = json.dumps([sizes, said], skipkeys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()
