"""The arguments of the environment `agent`."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minidistill.envs.agent.env import AgentEnvironment, Function, Settings
from minidistill.envs.agent.programs import Limits
from minidistill.envs.arguments import require_argument
from minidistill.envs.jsonl.arguments import checked_source
from minidistill.envs.jsonl.env import check_counts, in_splits
from minidistill.envs.jsonl.lines import Line
from minidistill.envs.jsonl.rows import Source, read_rows
from minidistill.envs.registry import import_function
from minidistill.envs.strip import Strip
from minidistill.errors import UserError

_require = partial(require_argument, "agent", names_argument=True)


def load(
    command: str | list[str],
    path: str,
    eval_path: str | None = None,
    strip: str = "system",
    reward: str | None = None,
    num_train_examples: int | None = None,
    num_eval_examples: int | None = None,
    seed: int = 0,
    *,
    cwd: str | None = None,
    env: Sequence[str] = (),
    max_requests: int = 32,
    max_output: int = 1 << 22,
    max_processes: int = 64,
    max_memory: float = 4.0,
) -> AgentEnvironment:
    """Tasks for a program of the user's.

    `command` is started for each row of `path`, or of `eval_path`, which it gets as JSON. `strip`
    says what the student does not read of its requests: see `Strip`. `reward` is "json", the last
    line of its output, "module:function", or "none". `env` names environment variables that it
    gets in addition. It may ask for `max_requests` answers, write `max_output` bytes, and have
    `max_processes` processes with `max_memory` GiB in all. Raises UserError for arguments and rows
    that cannot be used.
    """
    words = command
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as error:
            _require(False, "command", command, f"quote it as a shell does ({error})")
    texts = isinstance(words, list) and all(isinstance(w, str) and "\0" not in w for w in words)
    _require(texts and bool(words), "command", command, "give a command and its arguments")
    _require(strip in ("system", "context"), "strip", strip, 'use "system" or "context"')
    _require(isinstance(cwd, str | None), "cwd", cwd, "give the path of a folder")
    names = isinstance(env, list | tuple) and all(isinstance(n, str) and n for n in env)
    _require(names, "env", env, "give a list of names of environment variables")
    for name, count in (
        ("max_requests", max_requests),
        ("max_output", max_output),
        ("max_processes", max_processes),
    ):
        _require(type(count) is int and count > 0, name, count, "use a whole number above 0")
    number = isinstance(max_memory, int | float) and not isinstance(max_memory, bool)
    _require(number and 0 < max_memory < 1e6, "max_memory", max_memory, "use GiB above 0")
    check_counts(num_train_examples, num_eval_examples, seed)
    places: dict[str, str] = {}
    lines = _tasks(checked_source("path", path), places)
    held_out: list[Line] = []
    if eval_path is not None:
        held_out = _tasks(checked_source("eval_path", eval_path), places, "eval/")
    train, evaluation = in_splits(lines, held_out, path, seed, num_eval_examples)
    folder = None if cwd is None else Path(cwd).expanduser()
    limits = Limits(max_output, max_processes, int(max_memory * (1 << 30)))
    settings = Settings(list(words), folder, list(env), max_requests, limits)
    scoring = _reward(reward)
    return AgentEnvironment(
        train[:num_train_examples],
        evaluation,
        settings,
        Strip("system" if strip == "system" else "context"),
        scoring,
    )


def _reward(reward: Any) -> Function | str | None:
    if reward is None or reward == "none":
        return None
    if reward == "json":
        return "json"
    function = isinstance(reward, str) and ":" in reward
    _require(function, "reward", reward, 'use "none", "json" or "module:function"')
    return import_function(reward, "args.reward", "reward")


def _tasks(source: Source, places: dict[str, str], prefix: str = "") -> list[Line]:
    """A task for each row, whose columns are the task's data. Raises UserError."""
    tasks = []
    for row in read_rows(source):
        id = row.values.get("id")
        id = f"{prefix}{row.number}" if id is None else str(id)
        if id in places:
            raise UserError(
                f"the id {id!r} is already used at {places[id]}",
                where=row.place,
                fix="give each line its own id; by default it is the line's number",
            )
        places[id] = row.place
        data = {key: value for key, value in row.values.items() if key != "id"}
        try:
            text = json.dumps(data, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            fix = "use values that JSON has"
            raise UserError(f"a row cannot be written as JSON: {error}", row.place, fix) from None
        # the program makes the prompts. This stands for them until then: equal for equal rows
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        message = {"role": "user", "content": f"\nTask {digest}"}
        tasks.append(Line(id, (message,), digest, data=dict(row.values), place=row.place))
    if not tasks:
        raise UserError("the file has no tasks", source.path, "write a JSON object a line")
    return tasks
