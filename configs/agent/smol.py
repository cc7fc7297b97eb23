"""The same with an agent framework: `pip install 'smolagents[openai]'`.

An agent of smolagents, with a tool, that answers a task in a few requests. In configs/agent.toml:

    command = ["python", "configs/agent/smol.py"]
    strip = "system"

smolagents writes its rules and its tools into the system message, some 1,000 words, which are what
is baked in. So a run needs `seq_len = 8192`, and a model that calls tools as `<tool_call>` JSON,
such as those of Qwen.
"""

from __future__ import annotations

import json
import os
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool

UNITS = {"kg": 2.2046, "km": 0.6214, "l": 0.2642}


@tool
def convert(value: float, unit: str) -> float:
    """Converts kg, km or l into pounds, miles or gallons.

    Args:
        value: How many of the unit.
        unit: The unit to convert from: kg, km or l.
    """
    return value * UNITS[unit]


def main() -> None:
    task = json.loads(os.environ.get("MINIDISTILL_TASK", "{}"))
    model = OpenAIModel(
        model_id=os.environ.get("AGENT_MODEL", "student"),
        api_base=os.environ.get("OPENAI_BASE_URL"),
        api_key=os.environ.get("OPENAI_API_KEY"),
    )
    agent = ToolCallingAgent(tools=[convert], model=model, max_steps=4, verbosity_level=0)
    answer = agent.run(task.get("prompt") or " ".join(sys.argv[1:]))
    print(answer)
    if task:
        steps = len(agent.memory.steps)
        reward = float(str(task.get("answer", "")) in str(answer))
        print(json.dumps({"reward": reward, "metrics": {"steps": steps}}))


if __name__ == "__main__":
    main()
