"""An example to copy for your own environment: sums of two numbers.

A configuration uses it with

    [[orchestrator.env]]
    id = "minidistill.envs.example:load"
    args = { largest = 99 }
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.envs import Reward, Task


@dataclass(frozen=True, slots=True)
class Addition:
    train: Sequence[Task]
    eval: Sequence[Task]

    def score(self, task: Task, completion: str) -> Reward:
        """1 for the right sum and 0 otherwise; `metrics` are averaged and logged beside it."""
        text = completion.strip()
        return Reward(float(text == task.answer), {"is_number": float(text.isdecimal())})


def load(largest: int = 99, num_eval_examples: int = 100, seed: int = 0) -> Addition:
    """All sums of two numbers up to `largest`, shuffled; the first ones are held out."""
    numbers = range(largest + 1)
    tasks = [
        Task(f"{a}+{b}", ({"role": "user", "content": f"What is {a} + {b}?"},), str(a + b))
        for a in numbers
        for b in numbers
    ]
    random.Random(seed).shuffle(tasks)
    return Addition(train=tasks[num_eval_examples:], eval=tasks[:num_eval_examples])
