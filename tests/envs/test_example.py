"""The example environment: its tasks, its rewards, and a run with its documented settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minidistill import cli
from minidistill.envs import example, has_rewards, load_environment
from minidistill.errors import EXIT_OK
from minidistill.types import Reward

RUN = """
max_steps = 1
seq_len = 128
[model]
name = "tiny-sokoban"
[orchestrator]
batch_size = 4
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
context = "You are good at sums.\\n\\n"
"""


def test_tasks_are_held_out_and_answers_scored() -> None:
    env = load_environment("minidistill.envs.example:load", {"largest": 9, "num_eval_examples": 20})
    train, held_out = ({task.id for task in split} for split in (env.train, env.eval))
    assert (len(train), len(held_out)) == (80, 20)
    assert not train & held_out
    task = next(task for task in (*env.train, *env.eval) if task.id == "3+9")
    assert task.messages == ({"role": "user", "content": "What is 3 + 9?"},)
    assert env.score(task, " 12\n") == Reward(1.0, {"is_number": 1.0})
    assert env.score(task, "13") == Reward(0.0, {"is_number": 1.0})
    assert env.score(task, "12.") == Reward(0.0, {"is_number": 0.0})
    assert has_rewards(env)


def test_a_run_with_the_configuration_of_the_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = re.search(r"(?ms)^ +\[\[orchestrator\.env\]\].*?^ +args = .*?$", example.__doc__ or "")
    assert table is not None
    Path("sums.toml").write_text(RUN + re.sub("(?m)^ +", "", table[0]) + "\n")
    assert cli.main(["run", "sums.toml", "--output_dir", "out"]) == EXIT_OK
    rollouts = Path("out/rollouts/step_000001.jsonl").read_text().splitlines()
    contents = {json.loads(line)["messages"][0]["content"] for line in rollouts}
    assert len(contents) == 2
    assert all(re.fullmatch(r"What is \d+ \+ \d+\?", content) for content in contents)
