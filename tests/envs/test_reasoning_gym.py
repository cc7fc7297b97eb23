"""`reasoning-gym`: with the real package where it is installed, and the error where it is not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.envs.outcomes import Attempt, ScoringError, score_attempts
from minidistill.envs.reasoning_gym import INSTANCES, ReasoningGym
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
needs_package = pytest.mark.skipif(
    not INSTALLED, reason="needs reasoning-gym: pip install 'minidistill[reasoning-gym]'"
)
CONFIGS = sorted((ROOT / "configs" / "reasoning-gym").glob("*.toml"))
FEW: dict[str, Any] = {"num_train_examples": 12, "num_eval_examples": 6}


def load(dataset: str, **args: Any) -> ReasoningGym:
    env = load_environment("reasoning-gym", {"dataset": dataset, **FEW, **args})
    assert isinstance(env, ReasoningGym)
    return env


def contents(env: ReasoningGym) -> list[set[str]]:
    return [{t.messages[0]["content"] for t in split} for split in (env.train, env.eval)]


@needs_package
@pytest.mark.parametrize("dataset", sorted(INSTANCES))
@pytest.mark.parametrize("rules", ["prompt", "omit"])
def test_tasks_are_distinct_and_the_data_set_scores_them(dataset: str, rules: str) -> None:
    env = load(dataset, rules=rules)
    train, held_out = contents(env)
    assert (len(train), len(held_out)) == (12, 6)
    assert not train & held_out
    assert [t.messages for t in load(dataset, rules=rules).train] == [t.messages for t in env.train]
    assert contents(load(dataset, rules=rules, seed=1))[0] != train
    for task in (*env.train[:3], *env.eval[:3]):
        own = env.example_answer(task)
        assert own == f"<answer>{task.answer}</answer>"
        assert env.score(task, f"First <answer>no</answer>, then {own}.").value == 1.0
        assert env.score(task, "<answer>no</answer>").value < 0.5
        unanswered = env.score(task, task.answer)
        assert (unanswered.value, unanswered.metrics) == (0.0, {"answered": 0.0})
        words = task.messages[0]["content"].split()
        assert ("<answer>" in " ".join(words)) == (rules == "prompt")


@needs_package
def test_the_rules_that_are_omitted_are_those_of_the_question() -> None:
    short = {
        "ab": "#A B# A#", "caesar_cipher": "KHOOR", "spell_backward": "sun",
    }  # fmt: skip
    entries: dict[str, dict[str, Any]] = {
        "ab": {"question": "Rules.\n\nNow, consider the following program:\n\n#A B# A#\n\nReturn"},
        "caesar_cipher": {"metadata": {"cipher_text": "KHOOR"}},
        "spell_backward": {"metadata": {"word": "sun"}},
    }
    assert {name: INSTANCES[name](entry) for name, entry in entries.items()} == short
    for dataset in INSTANCES:
        full, omitted = load(dataset), load(dataset, rules="omit")
        for a, b in zip(full.train, omitted.train, strict=True):
            assert a.id == b.id
            assert len(b.messages[0]["content"]) < len(a.messages[0]["content"])


@needs_package
def test_any_data_set_takes_its_own_configuration() -> None:
    env = load("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, answer="bare")
    task = env.train[0]
    assert "<answer>" not in task.messages[0]["content"]
    assert env.score(task, f" {task.answer}\n").value == 1.0


@needs_package
@pytest.mark.parametrize(
    ("args", "where", "words"),
    [
        ({"dataset": "spell_backwards"}, "args.dataset", "did you mean 'spell_backward'?"),
        ({"dataset": "ab", "size": 3}, "args.size", "ab takes length"),
        ({"dataset": "ab", "length": 0}, "args", "length must be greater than 0"),
        ({"dataset": "ab", "rules": "none"}, "args.rules", 'use "prompt" or "omit"'),
        ({"dataset": "chain_sum", "rules": "omit"}, "args.rules", "is known for ab, "),
        ({"dataset": "ab", "answer": "json"}, "args.answer", 'use "tag" or "bare"'),
        ({"dataset": "ab", "num_eval_examples": 0}, "args.num_eval_examples", "above 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    args: dict[str, Any], where: str, words: str
) -> None:
    with pytest.raises(UserError) as error:
        load_environment("reasoning-gym", args)
    assert error.value.where == where
    assert words in str(error.value)


@needs_package
def test_a_data_set_with_few_questions_fills_the_held_out_split_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = {"length": 1, "num_eval_examples": 3, "num_train_examples": 5}
    env = load("ab", **small)
    train, held_out = contents(env)
    assert (len(train), len(held_out)) == (1, 3)
    assert "1 different questions for train, of 5 wanted" in caplog.text
    with pytest.raises(UserError, match="too few different questions"):
        load("ab", **{**small, "num_eval_examples": 4})


@needs_package
def test_a_score_that_raises_is_a_failure_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    env = load("ab")

    def broken(answer: str, entry: dict[str, Any]) -> float:
        raise KeyError("metadata")

    monkeypatch.setattr(env.scoring.dataset, "score_answer", broken)
    outcomes: dict[int, Any] = {}
    score_attempts(env, [Attempt(env.train[0], "<answer>A#</answer>")], outcomes.__setitem__)
    assert isinstance(outcomes[0], ScoringError)


@needs_package
def test_it_passes_the_check_and_a_run_scores_in_another_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = '{ dataset = "spell_backward", num_train_examples = 8, num_eval_examples = 4 }'
    assert cli.main(["env", "check", "reasoning-gym", "--args", args, "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)[0]["passed"]
    flags = (
        "--orchestrator.env.0.id", "reasoning-gym", "--orchestrator.env.0.args", args,
        "--orchestrator.teacher_model.context", "Spell backward.\n\n", "--max_steps", "1",
        "--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "2",
        "--orchestrator.sampling.max_tokens", "4", "--output_dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert cli.main(["run", *flags]) == EXIT_OK
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert {"reward/mean", "reward/answered"} <= set(json.loads(line))


@pytest.mark.parametrize("missing", ["reasoning_gym", "reasoning_gym.factory"])
def test_the_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as error:
        load_environment("reasoning-gym", {"dataset": "ab"})
    assert error.value.exit_code == EXIT_ENVIRONMENT
    assert "is not installed" in error.value.what
    assert error.value.fix == "pip install 'minidistill[reasoning-gym]'"


def test_there_is_a_configuration_for_each_of_the_five() -> None:
    assert len(CONFIGS) == 5
    datasets = [load_config([str(p)]).config.orchestrator.env[0].args["dataset"] for p in CONFIGS]
    assert sorted(datasets) == sorted(INSTANCES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_configuration_omits_the_rules_and_fits(path: Path, offline: None) -> None:
    loaded = load_config([str(path)])
    [env] = loaded.config.orchestrator.env
    assert env.args["rules"] == "omit"
    assert "<answer>" in loaded.config.orchestrator.teacher_model.context
    machine = Machine(gpus=1, bytes=24 * GIB, vllm=True, bf16=True, bitsandbytes=True)
    assert plan_run(loaded, machine, shipped=True).fits
    if INSTALLED:
        load_environment("reasoning-gym", {**env.args, **FEW})
