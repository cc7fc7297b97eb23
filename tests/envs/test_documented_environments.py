"""The code and the tables of docs/environments.md, as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.config import load_config
from minidistill.envs.rewards import build
from minidistill.envs.rewards.build import BUILT_IN
from minidistill.errors import EXIT_OK

DOCUMENT = (ROOT / "docs" / "environments.md").read_text()
RUN = """
max_steps = 1
seq_len = 128
trainer.loss.adv_tau = {adv_tau}
[orchestrator]
batch_size = 4
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
context = "You know every capital.\\n\\n"
"""


def blocks(language: str) -> list[str]:
    return re.findall(f"(?ms)^```{language}\n(.*?)^```", DOCUMENT)


def test_the_environment_of_20_lines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = blocks("python")
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    assert "Save this as `capitals.py`" in DOCUMENT
    Path("capitals.py").write_text(code)
    Path("run.toml").write_text(RUN.format(adv_tau=0.5) + blocks("toml")[0])
    assert cli.main(["run", "run.toml", "--output_dir", "out"]) == EXIT_OK
    rollouts = Path("out/rollouts/step_000001.jsonl").read_text().splitlines()
    asked = {json.loads(line)["task_id"] for line in rollouts}
    assert len(asked) == 2
    assert asked <= {"France", "Japan", "Kenya"}
    [record] = [
        line
        for line in map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
        if "reward/mean" in line
    ]
    assert {"reward/mean", "reward/words"} <= set(record)


def test_the_environment_of_several_turns_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = blocks("python")
    monkeypatch.chdir(tmp_path)
    assert "Save this as\n`guessing.py`" in DOCUMENT
    Path("guessing.py").write_text(code)
    Path("run.toml").write_text(RUN.format(adv_tau=0.5) + blocks("toml")[1])
    assert cli.main(["run", "run.toml", "--output_dir", "out"]) == EXIT_OK
    lines = Path("out/rollouts/step_000001.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert len(rollouts) == 4
    for rollout in rollouts:
        hints = [each["text"].split("<|user|>")[1] for each in rollout["inserted"]]
        assert hints == ["That is no number.<|end|><|assistant|>"] * 2
    [record] = [
        line
        for line in map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
        if "reward/mean" in line
    ]
    assert record["reward/guesses"] == record["turns/mean"] == 3
    assert record["turns/restarts"] == record["env/errors"] == 0


def test_every_table_is_a_configuration(tmp_path: Path) -> None:
    tables = blocks("toml")
    assert len(tables) == 10
    for number, table in enumerate(tables):
        text = RUN.format(adv_tau=0 if "skip_verification" in table else 0.5)
        file = tmp_path / f"{number}.toml"
        file.write_text(text + table)
        load_config([str(file)])


def test_the_judge_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "key")
    file = tmp_path / "judge.toml"
    [table] = [table for table in blocks("toml") if "judge" in table]
    file.write_text(RUN.format(adv_tau=0.5) + table)
    [env] = load_config([str(file)]).config.orchestrator.env
    assert not build(env.args["reward"]).needs_answer


def test_every_built_in_reward_is_documented() -> None:
    [section] = re.findall(r"(?ms)^## Built-in rewards\n(.*?)^## ", DOCUMENT)
    rows = re.findall(r"(?m)^\| (`[a-z_`, ]+`) \|", section)
    assert set(re.findall("`([a-z_]+)`", " ".join(rows))) == set(BUILT_IN)


def test_what_an_environment_imports_is_cheap() -> None:
    code = (
        "import sys; from minidistill.envs import Reward, Task; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'httpx', 'jsonschema') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
