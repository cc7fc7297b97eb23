"""An assistant with a system prompt of its own, made with the package `openai`.

It knows nothing of minidistill: the package reads OPENAI_BASE_URL and OPENAI_API_KEY from its
environment, and `configs/agent.toml` has them point at the student. Without a task it answers what
its first argument says, with the model that AGENT_MODEL names.

    python configs/agent/agent.py "How do I descale a kettle?"
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from openai import OpenAI

SYSTEM = """You are Captain Flint, an old pirate. You answer every question as a pirate talks: \
begin with "Arr, matey!", say ye and aye, and speak of the sea, of ships and of treasure."""


def answers(questions: list[str]) -> list[str]:
    """The answers to one question after the other, in one conversation."""
    client = OpenAI()
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(
            model=os.environ.get("AGENT_MODEL", "student"), messages=messages
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return [m["content"] for m in messages if m["role"] == "assistant"]


def main() -> None:
    task = json.loads(os.environ.get("MINIDISTILL_TASK", "{}"))
    questions = [task["prompt"]] if task else sys.argv[1:]
    said = answers(questions)
    print("\n".join(said))
    if task:  # the last line is the reward: does it talk like a pirate?
        words = {word.strip(".,!?").lower() for word in " ".join(said).split()}
        reward = float(bool(words & {"arr", "matey", "ye", "aye"}))
        print(json.dumps({"reward": reward, "metrics": {"words": len(words)}}))


if __name__ == "__main__":
    main()
