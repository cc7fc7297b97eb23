"""An environment that raises what no code should, in any of its parts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from minidistill.envs import Reward, Task


def panic() -> None:
    """A panic of a Rust extension, which is no Exception."""
    from tokenizers import decoders

    decoders.Strip("a", 5, 5).decode(["a"])


def _raise(error: BaseException) -> NoReturn:
    raise error


def press_ctrl_c() -> None:
    """What a terminal does: the process gets the signal, whatever it is doing."""
    os.kill(os.getpid(), signal.SIGINT)


def swallow_ctrl_c() -> None:
    """Press Ctrl-C, and raise something else instead of what it raises."""
    try:
        press_ctrl_c()
    except KeyboardInterrupt:
        raise ValueError("swallowed") from None


FAULTS: dict[str, Callable[[], object]] = {
    "exit": lambda: sys.exit(0),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "generator": lambda: _raise(GeneratorExit()),
    "cancelled": lambda: _raise(asyncio.CancelledError()),
    "base": lambda: _raise(BaseException("odd")),
    "panic": panic,
    "recursion": lambda: _raise(RecursionError("too deep")),
    "memory": lambda: _raise(MemoryError()),
}
SAYS = {
    "exit": "it called sys.exit(0)",
    "interrupt": "KeyboardInterrupt",
    "generator": "GeneratorExit",
    "cancelled": "CancelledError",
    "base": "BaseException: odd",
    "panic": "PanicException: index out of bounds",
    "recursion": "RecursionError: too deep",
    "memory": "MemoryError",
}
"""What a message about each of them contains."""
KEYS = {"ctrl-c": press_ctrl_c, "swallowed ctrl-c": swallow_ctrl_c}
TASKS = [
    Task(f"train/{i}", ({"role": "user", "content": f"Tell me about {i} cats."},)) for i in range(8)
]


class Tasks(Sequence[Task]):
    def __init__(self, env: Env) -> None:
        self.env = env

    def __len__(self) -> int:
        self.env.commit("length")
        return len(TASKS)

    def __getitem__(self, index: Any) -> Any:
        self.env.commit("task")
        return TASKS[index]


class MadeTogether(Tasks):
    def make_tasks(self, indices: Sequence[int], advance: Callable[[int], None]) -> list[Task]:
        self.env.commit("make_tasks")
        return [TASKS[index] for index in indices]


class Env:
    """Commits one fault, in one place. `score` commits each in turn, and those of `keys` last."""

    scores_in_process = True
    calls = 0

    def __init__(self, place: str, fault: str, keys: int = 0) -> None:
        self.place, self.fault, self.keys = place, fault, keys
        if place != "score_all":
            self.__dict__["score_all"] = None
        self.commit("load")

    def commit(self, place: str) -> None:
        if place == self.place:
            (FAULTS | KEYS)[self.fault]()

    @property
    def train(self) -> Sequence[Task]:
        self.commit("train")
        return MadeTogether(self) if self.place == "make_tasks" else Tasks(self)

    eval = TASKS[:2]

    @property
    def has_rewards(self) -> bool:
        self.commit("has_rewards")
        return True

    def score(self, task: Task, completion: str) -> Reward:
        self.commit("score")
        if self.place == "each":
            self.calls += 1
            if self.calls % 2:
                FAULTS[list(FAULTS)[self.calls // 2 % len(FAULTS)]]()
        return Reward(0.5)

    def score_all(self, attempts: Any, report: Any) -> None:
        self.commit("score_all")

    def check_ready(self) -> None:
        self.commit("check_ready")

    def close(self) -> None:
        self.commit("close")


def load(place: str = "", fault: str = "exit") -> Env:
    return Env(place, fault)
