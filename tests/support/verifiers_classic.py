"""An environment of verifiers, before its version 0.4: guessing, with what a test asks for."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

RULES = "Guess a number from 1 to 9."


class Guessing(vf.MultiTurnEnv):
    """Says "higher" or "lower" until a guess is right. Its second answer ends it."""

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> list[dict[str, str]]:
        if state["answer"] == state["fault"]:
            raise RuntimeError("the number is lost")
        guess = messages[-1]["content"]
        hint = "higher" if guess < state["answer"] else "lower"
        return [{"role": "user", "content": f"{hint} than {len(guess)} letters"}]

    async def setup_state(self, state: Any) -> Any:
        state["fault"] = self.fault
        return state

    @vf.stop
    async def guessed(self, state: Any) -> bool:
        steps = state["trajectory"]
        return bool(steps) and steps[-1]["completion"][-1]["content"] == state["answer"]


def right(completion: Any, answer: str) -> float:
    return float(completion[-1]["content"] == answer)


async def letters(completion: Any) -> int:
    return sum(len(m["content"]) for m in completion if m["role"] == "assistant")


def broken(answer: str) -> float:
    return 1 / (int(answer) - 3)


def nothing(answer: str) -> Any:
    return None


def look(at: int) -> str:
    """Look at a number.

    Args:
        at: the number
    """
    return f"{at} letters"


def compared(completions: Any) -> list[float]:
    return [0.0 for _ in completions]


FUNCTIONS = {f.__name__: f for f in (right, letters, broken, nothing, compared)}


def load_environment(
    turns: int = 3,
    rewards: tuple[str, ...] | list[str] = ("right", "letters"),
    weights: tuple[float, ...] | list[float] = (2.0, 0.0),
    fault: str = "",
    held_out: bool = False,
    tools: bool = False,
    numbers: int = 9,
) -> Any:
    rows = [
        {"prompt": [{"role": "user", "content": f"{RULES} {i}"}], "answer": str(i)}
        for i in range(1, numbers + 1)
    ]
    extra: dict[str, Any] = {"eval_dataset": Dataset.from_list(rows[:2])} if held_out else {}
    functions = [FUNCTIONS[name] for name in rewards]
    rubric = vf.Rubric(funcs=functions, weights=list(weights)) if functions else None
    if tools:
        return vf.ToolEnv(
            tools=[look], dataset=Dataset.from_list(rows), rubric=rubric, max_turns=turns
        )
    environment = Guessing(
        dataset=Dataset.from_list(rows), rubric=rubric, max_turns=turns, fault=fault, **extra
    )
    if turns == 1:
        return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric, **extra)
    return environment
