"""An environment that meddles with the run's output. It scores in its process."""

from __future__ import annotations

import os
import signal

from minidistill.envs import load_environment
from minidistill.envs.sokoban import SokobanEnv
from minidistill.types import Reward, Task


class Meddling:
    """Sokoban that does something before each score."""

    scores_in_process = True

    def __init__(self, args: dict[str, object]) -> None:
        inner = load_environment("sokoban-env", args)
        assert isinstance(inner, SokobanEnv)
        self.inner, self.train, self.eval = inner, inner.train, inner.eval

    def meddle(self) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        self.meddle()
        return self.inner.score(task, completion)


class _PrintingAndHangingUp(Meddling):
    def meddle(self) -> None:
        print("a score", flush=True)
        os.kill(os.getpid(), signal.SIGHUP)


def meddling(**args: object) -> Meddling:
    return _PrintingAndHangingUp(args)
