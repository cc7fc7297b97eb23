"""Environments that break their contract, each in one way."""

from __future__ import annotations

import random
from typing import Any

from minidistill.envs import Task

WORDS = ("ox", "yak", "elk", "gnu", "bee", "cat", "dog", "eel")


class Sound:
    """Spelling: nothing is wrong with it."""

    def __init__(self) -> None:
        self.train = [self.task(word) for word in WORDS[:5]]
        self.eval = [self.task(word) for word in WORDS[5:]]

    def task(self, word: str) -> Task:
        return Task(word, ({"role": "user", "content": f"Spell {word} backward."},), word[::-1])

    def score(self, task: Task, completion: str) -> Any:
        return float(completion.strip() == task.answer)


class Unseeded(Sound):
    def __init__(self) -> None:
        super().__init__()
        random.Random().shuffle(self.train)


class HashOrder(Sound):
    """Sets of texts have another order in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.train = [self.task(word) for word in {f"word {i}" for i in range(40)}]


class Growing(Sound):
    def __init__(self) -> None:
        import os

        super().__init__()
        self.train = self.train[: 4 if os.environ.get("PYTHONHASHSEED") == "1" else 5]


class SameId(Sound):
    def task(self, word: str) -> Task:
        return Task("one" if word in WORDS[:2] else word, super().task(word).messages, word[::-1])


class SharedId(Sound):
    def task(self, word: str) -> Task:
        id = "ox" if word == "cat" else word
        return Task(id, super().task(word).messages, word[::-1])


class SharedPrompt(Sound):
    def task(self, word: str) -> Task:
        shown = "ox" if word == "cat" else word
        return Task(word, super().task(shown).messages, shown[::-1])


class NotFinite(Sound):
    def score(self, task: Task, completion: str) -> Any:
        return float("nan") if completion == "" else 1.0


class Raising(Sound):
    def score(self, task: Task, completion: str) -> Any:
        return completion.split()[0] == task.answer


class Constant(Sound):
    def score(self, task: Task, completion: str) -> Any:
        return 0.5


class AnswerNotBest(Sound):
    def example_answer(self, task: Task) -> str:
        return f"It is {task.answer}."


class Slow(Sound):
    def score(self, task: Task, completion: str) -> Any:
        import time

        time.sleep(0.06)
        return super().score(task, completion)


class ShowsContext(Sound):
    def task(self, word: str) -> Task:
        content = f"{super().task(word).messages[0]['content']} Spell well."
        return Task(word, ({"role": "user", "content": content},), word[::-1])


class Long(Sound):
    def task(self, word: str) -> Task:
        return Task(word, ({"role": "user", "content": f"{word} " * 2000},), word[::-1])


class Empty(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.eval = []


class NoRewards(Sound):
    has_rewards = False


class NoAnswers(Sound):
    def task(self, word: str) -> Task:
        return Task(word, super().task(word).messages)

    def score(self, task: Task, completion: str) -> Any:
        return float(len(completion) > 100)


class Dated(Sound):
    """TOML has dates among its values."""

    def __init__(self, day: Any) -> None:
        super().__init__()
        self.train = [Task(f"{day.year}/{t.id}", t.messages, t.answer) for t in self.train]
