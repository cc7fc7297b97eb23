"""A judge on this machine for tests, and what is asked of it."""

from __future__ import annotations

from typing import Any

from minidistill.envs.outcomes import Attempt, Outcome, ScoringError
from minidistill.envs.rewards import build
from minidistill.types import Task
from support.judge_server import Answer, Handler

KEY = "sk-secret-0123"
TASK = Task("t", ({"role": "user", "content": "Say {answer}."},), "yes")
PROMPT = "Q: {prompt}\nA: {completion}\nRight: {answer}\nScore from 0 to 10?"


def judge(url: str, **args: Any) -> Any:
    table = {"type": "judge", "url": url, "model": "m", "prompt": PROMPT, "scale": [0, 10]}
    return build({**table, **args})


def ask(reward: Any, *completions: str, task: Task = TASK) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    attempts = [Attempt(task, completion) for completion in completions]
    reward.score_all(attempts, lambda index, outcome: outcomes.update({index: outcome}))
    assert sorted(outcomes) == list(range(len(completions)))
    return [outcomes[index] for index in sorted(outcomes)]


def failure(reward: Any) -> ScoringError:
    [outcome] = ask(reward, "anything")
    assert isinstance(outcome, ScoringError)
    return outcome


def say(content: object) -> Answer:
    return lambda handler, body: handler.say(content)


def hang(handler: Handler, body: dict[str, Any]) -> None:
    handler.judge.hang_up.wait(30)
