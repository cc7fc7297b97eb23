"""A multi-turn environment that does in its second turn what a task's number says."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from minidistill.envs import Policy, Task

Fault = Callable[[], Awaitable[Any]]


class Echo:
    """Says each answer's length and asks again. `faults` has what happens to some tasks."""

    def __init__(
        self, faults: dict[str, Fault], count: int, turns: int, forgets: bool = False
    ) -> None:
        """With `forgets`, a turn's messages do not begin with those of the turn before."""
        self.faults, self.turns, self.forgets = faults, turns, forgets
        tasks = [
            Task(str(i), ({"role": "user", "content": f"Solve this puzzle. {i}"},))
            for i in range(count + 4)
        ]
        self.train, self.eval = tasks[:count], tasks[count:]

    async def rollout(self, task: Task, policy: Policy) -> Any:
        messages: list[Any] = list(task.messages)
        length = 0
        for number in range(self.turns):
            turn = await policy(messages)
            length += len(turn.text)
            if number == 1 and str(task.id) in self.faults:
                return await self.faults[str(task.id)]()
            reply = f"{len(turn.text)} letters. Give the moves."
            if self.forgets:
                messages = [{"role": "user", "content": reply}]
                continue
            messages += [
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": reply},
            ]
        return {"reward": float(length % 3), "letters": length}


async def raising() -> float:
    raise RuntimeError("the board is gone")


async def hanging() -> float:
    await asyncio.sleep(3600)
    return 0.0


async def slow() -> float:
    await asyncio.sleep(0.15)
    await asyncio.sleep(0.15)
    return 0.0


async def kill() -> float:
    """Kill the process of the run if the file is there that the variable KILL names."""
    if Path(os.environ.get("KILL", "never")).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


async def not_a_number() -> float:
    return math.nan


def load(
    faults: dict[str, str] | None = None, count: int = 8, turns: int = 2, forgets: bool = False
) -> Echo:
    """`faults` names a fault for the id of a task: "raise", "hang", "slow", "kill" or "NaN"."""
    known = {"raise": raising, "hang": hanging, "slow": slow, "kill": kill, "NaN": not_a_number}
    return Echo({id: known[name] for id, name in (faults or {}).items()}, count, turns, forgets)
