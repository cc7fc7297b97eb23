"""An environment's tasks as text, to compare what two loads of it give.

As a program it loads an environment in a process of its own and writes them to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from minidistill.envs.protocol import Environment, TasksMadeTogether, take_tasks
from minidistill.envs.registry import load_environment
from minidistill.system.subprocesses import Subprocess
from minidistill.types import Task

GENERATED = 32
"""Tasks looked at of a split that takes long to make them."""
LOAD_SECONDS = 600.0
MODULE = "minidistill.envs.task_rows"


def first_tasks(tasks: Sequence[Task]) -> list[Task]:
    """All tasks of a split, or the first ones of a split that has `make_tasks`."""
    count = min(GENERATED, len(tasks)) if isinstance(tasks, TasksMadeTogether) else len(tasks)
    return take_tasks(tasks, range(count))


def task_rows(environment: Environment) -> dict[str, list[str]]:
    """For each split its tasks' ids, messages and answers as JSON. Answers that are no plain data
    count by their type."""
    return {
        split: [
            json.dumps(
                [task.id, [dict(message) for message in task.messages], task.answer],
                skipkeys=True,
                default=lambda value: type(value).__name__,
            )
            for task in first_tasks(tasks)
        ]
        for split, tasks in (("train", environment.train), ("eval", environment.eval))
    }


def rows_elsewhere(id: str, args: dict[str, Any]) -> dict[str, list[str]]:
    """`task_rows` of the environment in a new process, whose hashes of texts are other ones.

    Raises RuntimeError if that fails.
    """
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        request = Path(folder) / "request.toml"  # which the args are from: they may have dates
        request.write_text(tomli_w.dumps({"id": id, "args": args}))
        process = Subprocess(MODULE, [str(request), str(result)], [], {"PYTHONHASHSEED": other})
        try:
            process.popen.wait(LOAD_SECONDS)
            if not result.is_file():
                raise RuntimeError(f"the other process failed: {process.exit_report()[1]}")
            rows: dict[str, list[str]] = json.loads(result.read_text())
            return rows
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no other process loads it within {LOAD_SECONDS:g} s") from None
        finally:
            process.close()


if __name__ == "__main__":
    request, result = map(Path, sys.argv[1:])
    rows = task_rows(load_environment(**tomli.loads(request.read_text())))
    result.write_text(json.dumps(rows))
    os._exit(0)  # without waiting for threads that the environment started
