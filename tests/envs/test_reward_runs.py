"""Runs with rewards that hang, exit or are built in, and what they leave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.judge_server import serving
from support.runs import board, records

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_HEALTH, EXIT_OK, EXIT_USAGE

HANGING = r"([\s\S]|[\s\S])*Q{9}"
TOML = """
max_steps = 2
seq_len = 128
ckpt.interval = 1
[trainer.loss]
adv_tau = 0.5
[orchestrator]
batch_size = 8
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver.\\n\\n"
[[orchestrator.env]]
id = "jsonl"
score_timeout = 0.3
args = { path = "prompts.jsonl" }
"""
PURE = (
    "--trainer.loss.adv_tau", "0", "--orchestrator.buffer.skip_verification",
    "--orchestrator.eval", "--orchestrator.teacher_model.eval_baseline",
)  # fmt: skip
REWARD = "--orchestrator.env.0.args.reward"


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets a current directory with a configuration and prompts, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Path("own.toml").write_text(TOML)
    write_prompts(answer="a")


def write_prompts(answer: str) -> None:
    lines = [{"prompt": f"Tell me about {i} cats.", "answer": answer} for i in range(12)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def run(*flags: str, output: str = "out") -> int:
    return cli.main(["run", "own.toml", "--output_dir", output, *flags])


def rollouts(output: str = "out") -> list[dict[str, Any]]:
    files = sorted(Path(output, "rollouts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def scoring_processes() -> list[str]:
    """Command lines of this process's children that score."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                lines.append(path.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in lines if "minidistill.envs.worker" in line]


def test_a_regular_expression_that_never_ends_stops_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_prompts(answer=HANGING)
    began = time.monotonic()
    assert run(REWARD, "regex") == EXIT_HEALTH
    assert time.monotonic() - began < 60
    error = capsys.readouterr().err
    assert "the environment failed on 1 of 8 rollouts" in error
    assert "it took longer than score_timeout = 0.3 s, and was stopped" in error
    assert not scoring_processes()


def test_a_reward_that_exits_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("leaving.py").write_text("import sys\ndef rew(task, text):\n    sys.exit()\n")
    assert run(REWARD, "leaving:rew") == EXIT_HEALTH
    error = capsys.readouterr().err
    assert "the environment failed on 8 of 8 rollouts" in error
    assert "it called sys.exit()" in error
    assert not scoring_processes()


def test_a_run_goes_on_without_the_rollouts_that_hang_and_resumes_exactly() -> None:
    """What hangs is decided by the text, so two runs drop the same rollouts."""
    flags = (
        REWARD, "support.faulty_rewards:slow_when_long", "--orchestrator.max_env_error_frac", "0.9",
        "--max_steps", "3",
    )  # fmt: skip
    assert run(*flags) == EXIT_OK
    steps = [record for record in records(Path("out")) if "env/errors" in record]
    dropped = [int(record["env/errors"]) for record in steps]
    assert sum(dropped) > 0
    assert len(rollouts()) == 3 * 8 - sum(dropped)
    for rollout in rollouts():
        assert rollout["reward"] == len(rollout["completion"]) / 100
    # as if it had been killed after step 2, and with another limit of time
    metrics = Path("out/metrics.jsonl").read_text()
    Path("out/scoreboard.json").unlink()
    latest = Path("out/checkpoints")
    for path in latest.glob("step_000003"):
        path.rename(latest.parent / "moved")
    assert run(*flags, "--resume", "--orchestrator.env.0.score_timeout", "0.4") == EXIT_OK
    assert [record for record in records(Path("out")) if "env/errors" in record] == steps
    assert Path("out/metrics.jsonl").read_text() != metrics  # the timings of step 3
    assert not scoring_processes()


def test_a_built_in_reward_for_evaluation_alone() -> None:
    Path("own.toml").write_text(
        TOML + "[[orchestrator.eval.env]]\n"
        'id = "jsonl"\nname = "brief"\n'
        'args = { path = "prompts.jsonl", num_eval_examples = 4, '
        'reward = { type = "length", unit = "tokens", max = 4 } }\n'
    )
    assert run(*PURE) == EXIT_OK
    assert {rollout["reward"] for rollout in rollouts()} == {None}
    scores = board(Path("out"))
    assert scores["env"] == "brief"
    assert scores["eval_tasks"] == 4
    # a completion of up to 8 tokens earns 4 / 8 to 1
    for key in ("baseline_student", "baseline_teacher", "student", "student_with_context"):
        assert 0.5 <= scores[key] <= 1
    assert scores["student"] < 1


def test_a_judge_in_training() -> None:
    Path("own.toml").write_text(
        TOML.replace(
            'args = { path = "prompts.jsonl" }',
            'args = { path = "prompts.jsonl", reward = { type = "judge", model = "m", '
            'prompt = "{completion}", url = "http://127.0.0.1:1" } }',
        )
    )

    def by_length(handler: Any, body: dict[str, Any]) -> None:
        text = body["messages"][0]["content"]
        handler.say("?" if len(text) % 5 == 4 else str(len(text) / 1000))

    with serving(by_length) as server:
        url = (f"{REWARD}.url", server.url)
        assert run(*url, "--orchestrator.max_env_error_frac", "0.9") == EXIT_OK
    texts = {rollout["completion"] for rollout in rollouts()}
    for rollout in rollouts():
        assert rollout["reward"] == len(rollout["completion"]) / 1000
        assert len(rollout["completion"]) % 5 != 4
    errors = sum(r["env/errors"] for r in records(Path("out")) if "env/errors" in r)
    assert len(rollouts()) == 16 - errors
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert texts <= set(asked)
    judged = [text for text in asked if len(text) % 5 != 4]
    assert len(judged) == len(set(judged))  # equal completions are judged once


def test_a_judge_that_is_not_reached_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(lambda handler, body: None) as server:
        pass
    judge = f'{{ type = "judge", model = "m", prompt = "{{completion}}", url = "{server.url}" }}'
    assert run(REWARD, judge) == EXIT_ENVIRONMENT
    assert f"the judge at {server.url} cannot be asked" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_unknown_reward_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(REWARD, "lenght") == EXIT_USAGE
    assert "did you mean 'length'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_environment_that_exits_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.toml").write_text(
        TOML.replace('id = "jsonl"', 'id = "support.faulty_rewards:LeavingEnv"').replace(
            'args = { path = "prompts.jsonl" }', ""
        )
    )
    assert run() == EXIT_FAILED
    err = capsys.readouterr().err
    assert "LeavingEnv' failed in its task 0 of train: it called sys.exit(0)" in err
    assert not Path("out").exists()
