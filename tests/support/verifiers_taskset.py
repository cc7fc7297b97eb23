"""A task set of verifiers 0.4: guessing, with what a test asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf

__all__ = ["GuessingEnv", "GuessingTasks"]
RULES = "Guess a number from 1 to 9."


class GuessingConfig(vf.TasksetConfig):
    fault: str = ""
    numbers: int = 9


class NumberData(vf.TaskData):
    answer: str
    fault: str


class Number(vf.Task[NumberData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: Any) -> float:
        if self.data.fault == f"reward {self.data.answer}":
            raise RuntimeError("the reward is lost")
        return float(_last(trace) == self.data.answer)

    @vf.metric
    async def letters(self, trace: Any) -> float:
        return float(len(_last(trace)))


def _last(trace: Any) -> str:
    answers = [m.content for m in trace.branches[-1].messages if m.role == "assistant"]
    return str(answers[-1])


class GuessingTasks(vf.Taskset[Number, GuessingConfig]):
    def load(self) -> Iterator[Number]:
        for number in range(1, self.config.numbers + 1):
            yield Number(
                NumberData(
                    prompt=f"{RULES} {number}",
                    system_prompt="You are a guesser.",
                    answer=str(number),
                    fault=self.config.fault,
                )
            )


class GuessingEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    turns: int = 3


class GuessingEnv(vf.Env[GuessingEnvConfig]):
    async def run(self, task: Any, agents: Any) -> None:
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            for _ in range(self.config.turns - 1):
                if segment.terminated or segment.last_reply == task.data.answer:
                    break
                if task.data.fault == task.data.answer:
                    raise RuntimeError("the number is lost")
                hint = "higher" if segment.last_reply < task.data.answer else "lower"
                segment = await interaction.turn(f"{hint} than {len(segment.last_reply)} letters")
