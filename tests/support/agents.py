"""Configurations of the environment `agent`, whose program is `support.agent_program`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.paths import TESTS

PROGRAM = [sys.executable, "-S", str(TESTS / "support" / "agent_program.py")]
SECRET = "You are terse."  # the program's system message


def agent(folder: Path, *rows: dict[str, Any], **args: Any) -> tuple[str, ...]:
    """Flags of an agent with these tasks, and a held-out one."""
    for name, values in (("tasks", rows), ("eval", ({"question": "Solve this."}, *rows[:0]))):
        lines = "".join(json.dumps(row) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(lines)
    args = {"command": PROGRAM, "path": str(folder / "tasks.jsonl"), "reward": "json", **args}
    args["eval_path"] = str(folder / "eval.jsonl")
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in args.items())
    env = f'[{{id = "agent", turn_timeout = 120, args = {{{table}}}}}]'
    return ("--seq_len", "320", "--orchestrator.batch_size", "8", "--orchestrator.env", env)


def questions(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"Solve this puzzle. {i}", **more} for i in range(count)]
