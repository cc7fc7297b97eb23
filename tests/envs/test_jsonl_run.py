"""Runs on a file of prompts, with and without a reward."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.runs import board, records

from minidistill import cli
from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.errors import EXIT_OK, EXIT_USAGE
from minidistill.tasks.rewards import check_rewards

CONTEXT = "You are a world-class puzzle solver.\n\n"
TOML = """
max_steps = 2
seq_len = 128
[trainer.loss]
adv_tau = {adv_tau}
[orchestrator]
batch_size = 4
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.buffer]
skip_verification = {skip}
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver.\\n\\n"
eval_baseline = {baseline}
[orchestrator.eval]
interval = 1
[[orchestrator.env]]
id = "jsonl"
args = {{ path = "prompts.jsonl", num_eval_examples = 4{reward} }}
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets an empty current directory."""
    monkeypatch.chdir(tmp_path)


def run(name: str, *, reward: bool, adv_tau: float, baseline: bool, tables: str = "") -> int:
    lines = [{"prompt": f"Tell me about {i} cats.", "answer": "c.ts|sea$"} for i in range(12)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = TOML.format(
        adv_tau=adv_tau,
        skip="false" if adv_tau else "true",
        baseline="true" if baseline else "false",
        reward=', reward = "regex"' if reward else "",
    )
    Path("own.toml").write_text(text + tables)
    return cli.main(["run", "own.toml", "--output_dir", name])


def rollouts(name: str) -> list[dict[str, Any]]:
    files = sorted(Path(name, "rollouts").glob("*.jsonl"))
    assert len(files) == 2
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def check_prompts(records: list[dict[str, Any]]) -> None:
    """The rollouts are of training tasks, with the context in the teacher's prompt alone."""
    env = load_environment("jsonl", {"path": "prompts.jsonl", "num_eval_examples": 4})
    tasks = {task.id: task for task in env.train}
    assert len(records) == 8
    assert len({rollout["task_id"] for rollout in records}) == 4
    for rollout in records:
        assert rollout["messages"] == list(tasks[rollout["task_id"]].messages)
        content = rollout["messages"][0]["content"]
        assert rollout["prompt_text"] == f"<|user|>{content}<|end|><|assistant|>"
        assert rollout["teacher_prompt_text"] == f"<|user|>{CONTEXT}{content}<|end|><|assistant|>"


def test_a_run_with_a_reward() -> None:
    assert run("out", reward=True, adv_tau=0.5, baseline=True) == EXIT_OK
    written = rollouts("out")
    check_prompts(written)
    for rollout in written:
        assert rollout["reward"] == bool(re.search("c.ts|sea$", rollout["completion"]))
    assert {rollout["reward"] for rollout in written} == {0.0, 1.0}
    scoreboard = board(Path("out"))
    assert scoreboard["env"] == "jsonl"
    assert scoreboard["eval_tasks"] == 4
    for key in ("baseline_student", "baseline_teacher", "student", "student_with_context"):
        assert scoreboard[key] in (0, 0.25, 0.5, 0.75, 1)
    assert [r["step"] for r in records(Path("out")) if "eval/jsonl/student/avg" in r] == [1, 2]


def test_a_run_without_a_reward_reports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("out", reward=False, adv_tau=0, baseline=False) == EXIT_OK
    written = rollouts("out")
    check_prompts(written)
    assert {rollout["reward"] for rollout in written} == {None}
    scoreboard = board(Path("out"))
    for key in ("student", "baseline_student", "baseline_teacher", "baseline_diff", "gap_closed"):
        assert scoreboard[key] is None, key
    for key in ("teacher_kl_first", "heldout_kl_before", "heldout_kl_after", "length_after"):
        assert scoreboard[key] > 0, key
    for record in records(Path("out")):
        assert not any(key.startswith(("reward/", "eval/jsonl/")) for key in record), record
    # four held-out prompts are too few for a share, which is said before the run and after it
    text = "4 held-out prompts are too few to judge by: 8 give an interval"
    output = capsys.readouterr().out
    assert "student after" not in output
    assert output.count(text) == 2
    assert (scoreboard["outcome"], scoreboard["judged_by"]) == ("too_few_tasks", "teacher_kl")
    assert scoreboard["drift_judged_by"] == "teacher"
    assert len(scoreboard["completions"]) == 4
    for row in scoreboard["completions"]:
        assert re.fullmatch(r"Tell me about \d+ cats\.", row["prompt"])
        assert {len(row[key]) > 0 for key in ("before", "teacher", "after")} == {True}
        assert f"held-out prompt: {row['prompt']}" in output or row == scoreboard["completions"][3]


@pytest.mark.parametrize("change", ["one more", "another prompt", "another answer"])
def test_a_run_with_a_changed_file_is_not_resumed(
    change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", reward=True, adv_tau=0.5, baseline=False) == EXIT_OK
    Path("out/scoreboard.json").unlink()  # as if the run had not finished
    before = Path("out/metrics.jsonl").read_bytes()
    file, text = Path("prompts.jsonl"), Path("prompts.jsonl").read_text()
    extra = '\n{"prompt": "Tell me more.", "answer": "x"}'
    changed = {
        "one more": text + extra,
        "another prompt": text.replace("about 3 cats", "about 3 dogs"),
        "another answer": text.replace("sea$", "ocean$", 1),
    }[change]
    assert changed != text
    file.write_text(changed)
    resume = ["run", "own.toml", "--output_dir", "out", "--resume"]
    assert cli.main(resume) == EXIT_USAGE
    assert "was started with other tasks or prompts" in capsys.readouterr().err
    assert Path("out/metrics.jsonl").read_bytes() == before
    file.write_text(text)
    assert cli.main(resume) == EXIT_OK
    assert Path("out/scoreboard.json").exists()


def test_a_run_with_other_evaluation_tasks_is_not_resumed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = '[[orchestrator.eval.env]]\nid = "jsonl"\nargs = { path = "held.jsonl" }\n'
    held = Path("held.jsonl")
    held.write_text("".join(f'{{"prompt": "Name {i} rivers."}}\n' for i in range(12)))
    assert run("out", reward=False, adv_tau=0, baseline=False, tables=tables) == EXIT_OK
    Path("out/scoreboard.json").unlink()
    held.write_text(held.read_text().replace("rivers", "lakes"))
    assert cli.main(["run", "own.toml", "--output_dir", "out", "--resume"]) == EXIT_USAGE
    assert "was started with other tasks or prompts" in capsys.readouterr().err


def test_only_environments_with_a_reward_are_on_the_scoreboard() -> None:
    args = '{ rules = "omit", min_moves = 2, max_depth = 6, num_eval_examples = 8 }'
    sokoban = f'[[orchestrator.env]]\nid = "sokoban-env"\nargs = {args}\n'
    assert run("out", reward=False, adv_tau=0, baseline=False, tables=sokoban) == EXIT_OK
    scoreboard = board(Path("out"))
    assert scoreboard["env"] == "sokoban-env"
    assert scoreboard["student"] * 8 in range(9)
    names = {key for r in records(Path("out")) for key in r if key.endswith("/avg")}
    assert names == {"eval/sokoban-env/student/avg"}


@pytest.mark.parametrize(
    ("flags", "what", "fix"),
    [
        ({"adv_tau": 0.5, "baseline": False}, "adv_tau = 0.5", "skip_verification = true"),
        ({"adv_tau": 0.0, "baseline": True}, "eval_baseline = true", "eval_baseline = false"),
    ],
)
def test_settings_that_need_a_reward_are_refused_without_one(
    flags: dict[str, Any], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", reward=False, **flags) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "the environment 'jsonl' has no reward" in error
    assert what in error
    assert fix in error
    assert not Path("out").exists()


def test_the_shipped_prompts_load_and_fit_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(["configs/own-prompts.toml"]).config
    [env] = config.orchestrator.env
    loaded = load_environment(env.id, env.args)
    assert (len(loaded.train), len(loaded.eval)) == (16, 8)
    check_rewards(config, {"jsonl": loaded})
    check_rewards(config, {"jsonl": loaded}, evaluated=True)
    small = ["configs/own-prompts.toml", "--gpus", "1", "--gpu-memory", "24"]
    assert cli.main(["plan", *small]) == EXIT_OK


def test_every_prompt_of_a_file_is_checked_against_seq_len(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{"prompt": f"Tell me about {i} cats."} for i in range(80)]
    text = TOML.format(adv_tau=0, skip="true", baseline="false", reward="")
    Path("own.toml").write_text(text)
    for index in (10, 70):
        lines[index] = {"prompt": "cats and dogs " * 40}
        Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert cli.main(["run", "own.toml", "--output_dir", "out"]) == EXIT_USAGE
        assert "seq_len" in capsys.readouterr().err
        assert not Path("out").exists()
        lines[index] = {"prompt": "Tell me about dogs."}
