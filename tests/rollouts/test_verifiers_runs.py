"""Environments of verifiers in steps and in a run, with the real package where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.conversations import conversation_ids
from support.runs import records, run
from support.verifiers_package import (
    give_taskset_a_name,
    guessing,
    needs_classic,
    needs_either,
)

from minidistill.errors import EXIT_OK, UserError

pytestmark = needs_either


@pytest.fixture(autouse=True)
def _local_task_set(monkeypatch: pytest.MonkeyPatch) -> None:
    give_taskset_a_name(monkeypatch)


def table(**args: Any) -> tuple[str, str]:
    rows = [{"id": "verifiers", "name": "guessing", "args": guessing(**args)}]
    return "--orchestrator.env", json.dumps(rows)


def test_trained_tokens_are_those_sampled(staged: Any) -> None:
    stage = staged(*table())
    rollouts, metrics = stage.collect()
    assert (len(rollouts), metrics["env/errors"], metrics["turns/restarts"]) == (8, 0, 0)
    assert 1 < metrics["turns/mean"] <= 3
    sampled = [
        [*request.prompt_ids, *completion.token_ids]
        for requests, completions, _ in stage.engine.calls
        for request, completion in zip(requests, completions, strict=True)
    ]
    lengths = 0
    for rollout in rollouts:
        whole = conversation_ids(rollout)
        assert whole in sampled  # its last turn read all that came before
        assert {"right", "letters"} <= set(rollout.reward.metrics)
        lengths += len(rollout.completion.token_ids)
        context = stage.loaded.config.orchestrator.teacher_model.context.strip()
        assert context in rollout.prompt.teacher_text
        assert context not in rollout.prompt.student_text + rollout.text
    assert lengths == sum(len(c.token_ids) for _, cs, _ in stage.engine.calls for c in cs)


def test_the_same_step_is_the_same_conversations(staged: Any) -> None:
    first, again = (staged(*table()).collect()[0] for _ in range(2))
    assert [(r.completion, r.reward) for r in first] == [(r.completion, r.reward) for r in again]


@needs_classic
def test_a_failing_reward_function_drops_its_conversations(
    staged: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flags = (
        *table(rewards=["right", "broken"], weights=[1.0, 1.0]),
        "--orchestrator.batch_size", "32", "--orchestrator.max_env_error_frac",
    )  # fmt: skip
    rollouts, metrics = staged(*flags, "0.125").collect()
    assert (len(rollouts), metrics["env/errors"]) == (28, 4)
    assert "the reward function broken raised ZeroDivisionError" in caplog.text
    with pytest.raises(UserError, match="failed on 4 of 32 rollouts"):
        staged(*flags, "0.12").collect()


def test_a_run_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    flags = (
        *table(), "--seq_len", "320", "--orchestrator.batch_size", "8",
        "--orchestrator.rollouts_per_example", "4", "--ckpt.interval", "1",
        "--trainer.scheduler.type", "constant", "--orchestrator.eval.num_examples", "1",
    )  # fmt: skip
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run(whole, *flags, "--max_steps", "2") == EXIT_OK
    assert run(halved, *flags, "--max_steps", "1") == EXIT_OK
    assert run(halved, *flags, "--max_steps", "2", "--resume") == EXIT_OK
    last = [[r for r in records(path) if r.get("step") == 2] for path in (whole, halved)]
    keys = ("reward/mean", "reward/right", "turns/mean", "teacher_kl")
    [one], [two] = ([r for r in rows if "teacher_kl" in r] for rows in last)
    assert {key: one[key] for key in keys} == {key: two[key] for key in keys}
