"""Sokoban whose code changes torch's settings and random state, in each place that is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minidistill.envs import Environment, Reward, Task, load_environment


def meddle() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(0)


class Meddling:
    scores_in_process = True

    def __init__(self, inner: Environment, meddles: bool) -> None:
        self.inner, self.meddles = inner, meddles
        self.commit()

    def commit(self) -> None:
        if self.meddles:
            meddle()

    @property
    def train(self) -> Sequence[Task]:
        self.commit()
        return self.inner.train

    @property
    def eval(self) -> Sequence[Task]:
        self.commit()
        return self.inner.eval

    def score(self, task: Task, completion: str) -> Reward:
        self.commit()
        return self.inner.score(task, completion)


def load(meddles: bool, **arguments: Any) -> Meddling:
    return Meddling(load_environment("sokoban-env", arguments), meddles)
