"""Environments of several turns that break their contract, each in one way."""

from __future__ import annotations

import random
from typing import Any

from minidistill.envs import Reward, Task

WORDS = ("ox", "yak", "elk", "gnu", "bee", "cat", "dog", "eel")


class Asking:
    """Asks for a word until it is said: nothing is wrong with it."""

    def __init__(self, max_turns: int = 3) -> None:
        self.turns = max_turns
        tasks = [
            Task(word, ({"role": "user", "content": f"Say {word[0]}…{word[-1]}, one word."},), word)
            for word in WORDS
        ]
        self.train, self.eval = tasks[:5], tasks[5:]

    async def rollout(self, task: Task, policy: Any) -> Any:
        messages: list[Any] = list(task.messages)
        for number in range(self.turns):
            turn = await policy(messages)
            if turn.text == task.answer:
                return Reward(1 / (number + 1))
            messages += [
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": self.reply(task, turn.text)},
            ]
        return Reward(0.0)

    def reply(self, task: Task, text: str) -> str:
        return "Another one."

    def example_answer(self, task: Task) -> Any:
        return ["What?", task.answer]


class Random(Asking):
    """Draws from a generator that no seed decides."""

    def reply(self, task: Task, text: str) -> str:
        return f"Another one, {random.random()}."


class Shared(Asking):
    """What it says depends on how many others are played."""

    said = 0

    def reply(self, task: Task, text: str) -> str:
        self.said += 1
        return f"Answer {self.said} was wrong."


class Talkative(Asking):
    async def rollout(self, task: Task, policy: Any) -> Any:
        self.turns = 5  # though its args may say less
        return await super().rollout(task, policy)


class Raising(Asking):
    def reply(self, task: Task, text: str) -> str:
        raise LookupError("the word is gone")


class ShowsContext(Asking):
    def reply(self, task: Task, text: str) -> str:
        return "Spell well."


class Long(Asking):
    def reply(self, task: Task, text: str) -> str:
        return "no " * 700


class BadExample(Asking):
    def example_answer(self, task: Task) -> Any:
        return ["What?"]


class Constant(Asking):
    example_answer: Any = None

    async def rollout(self, task: Task, policy: Any) -> Any:
        await super().rollout(task, policy)
        return 1.0


class NoRewards(Asking):
    has_rewards = False
