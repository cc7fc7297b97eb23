"""Rewards with faults. A completion names the fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from minidistill.envs import Reward, Task
from minidistill.envs.outcomes import Attempt, Report


def faulty(task: Task, completion: str) -> Any:
    """Commit the fault that the completion names, else return the process's id as a metric."""
    if completion == "exit":
        sys.exit(3)
    if completion == "exit now":
        print("last words", flush=True)
        os._exit(5)
    if completion == "print":
        print("x" * 100_000, flush=True)
    if completion == "crash":
        os.kill(os.getpid(), 11)
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "base":
        raise BaseException("not an Exception")
    if completion == "sleep":
        time.sleep(3600)
    if completion == "hang":  # in C, with the interpreter's lock held
        re.match(r"([\s\S]|[\s\S])*Q{9}", "a" * 64)
    if completion == "child":  # another process, and then a hang
        subprocess.Popen(["sleep", "3600"])
        time.sleep(3600)
    return Reward(1.0, {"pid": os.getpid(), "safe path": "PYTHONSAFEPATH" in os.environ})


def slow_when_long(task: Task, completion: str) -> float:
    """Never return for one completion in a few, by its text alone."""
    if len(completion) % 4 == 3:
        time.sleep(3600)
    return len(completion) / 100


class Env:
    """Two tasks, and `faulty` as the score."""

    def __init__(self, answer: object = None) -> None:
        self.train = [Task("train/0", (), answer)]
        self.eval = [Task("eval/0", (), answer)]

    def score(self, task: Task, completion: str) -> Any:
        return faulty(task, completion)


class Together(Env):
    """Scores all completions in one call, from the last to the first, by their tokens."""

    def score(self, task: Task, completion: str) -> Any:
        raise AssertionError("one at a time")

    def score_all(self, attempts: Sequence[Attempt], report: Report) -> None:
        values: dict[str, Any] = {"number": 0.5, "text": "high", "nan": float("nan")}
        for index in reversed(range(len(attempts))):
            attempt = attempts[index]
            if attempt.completion == "raise":
                raise ZeroDivisionError("together")
            if attempt.completion == "forget":
                return
            if attempt.completion == "unknown":
                report(99, Reward(0.0))
            metrics = {**faulty(attempt.task, attempt.completion).metrics}
            value = Reward(attempt.tokens or 0, metrics | {"attempts": len(attempts)})
            report(index, values.get(attempt.completion, value))
            if attempt.completion == "twice":
                report(index, value)


def unpicklable() -> Env:
    return Env(lambda: None)


class Exits:
    def __reduce__(self) -> Any:
        sys.exit(0)


def exits_when_pickled() -> Env:
    return Env(Exits())


def only_in_the_driver() -> Env:
    """An environment that does not load in the process that scores."""
    if "minidistill.envs.worker" in sys.orig_argv:
        raise FileNotFoundError("a file that has gone")
    return Env()


class Leaving(Sequence[Task]):
    """Tasks that end the program when they are read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        sys.exit(0)


class LeavingEnv(Env):
    """An environment whose tasks end the program."""

    def __init__(self) -> None:
        super().__init__()
        self.train = self.eval = Leaving()  # type: ignore[assignment]
