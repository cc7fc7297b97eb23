"""The agents in configs/agent, which are made with public packages, against a scripted policy."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill.envs.agent import load
from minidistill.types import Reward, Turn


class Script:
    """A policy that says these texts, in turn."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, []  # type: ignore[var-annotated]

    async def __call__(self, messages: Any, **more: Any) -> Turn:
        self.asked.append((messages, more))
        return Turn(self.texts[len(self.asked) - 1], False, (1,), (0.0,), 10)

    def forget(self, turn: Turn) -> None:
        raise AssertionError("every answer is read")


def played(folder: Path, script: Script, package: str, program: str, **row: str) -> Any:
    """What the program's rollout returns for a task. Skips if its package is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    path = folder / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "another"}) + "\n" + json.dumps(row) + "\n")
    command = [sys.executable, str(ROOT / "configs" / "agent" / program)]
    environment = load(command, str(path), reward="json", env=["PYTHONPATH"])
    tasks = {task.data["prompt"]: task for task in (*environment.train, *environment.eval)}
    policy: Any = script
    return asyncio.run(environment.rollout(tasks[row["prompt"]], policy))


def test_an_agent_of_openai(tmp_path: Path) -> None:
    script = Script("Arr, matey! Sail north.")
    reward = played(tmp_path, script, "openai", "agent.py", prompt="Where to?")
    assert reward == Reward(1.0, {"words": 4.0})
    [(messages, more)] = script.asked
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "Captain Flint" in messages[0]["content"]
    assert more["tools"] == []


def test_an_agent_of_smolagents(tmp_path: Path) -> None:
    """It calls its tool, reads what that returns, and gives its answer with another call."""

    def call(name: str, **arguments: Any) -> str:
        value = {"name": name, "arguments": arguments}
        return f"<tool_call>\n{json.dumps(value)}\n</tool_call>"

    script = Script(call("convert", value=2, unit="kg"), call("final_answer", answer="4.41"))
    task = {"prompt": "How many pounds are 2 kg?", "answer": "4.41"}
    reward = played(tmp_path, script, "smolagents", "smol.py", **task)
    assert reward == Reward(1.0, {"steps": 3.0})
    (first, more), (second, _) = script.asked
    assert [tool["function"]["name"] for tool in more["tools"]] == ["convert", "final_answer"]
    assert first[0]["role"] == "system"
    assert "4.4092" in second[-1]["content"]
