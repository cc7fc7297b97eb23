"""Whole runs on the teacher's samples: what they learn, how they resume, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.lab import make_lab
from support.other_model import scaled_copy
from support.runs import board, plan_on_gpus, records, run

from minidistill.driver import loop
from minidistill.driver.preflight import check_prompts
from minidistill.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, UserError
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.placement.render import as_json

Configure = Callable[..., Any]
FROM_TEACHER = ("--orchestrator.sample_from", "teacher")
EMA = (
    "--orchestrator.teacher_model.update", "ema",
    "--orchestrator.teacher_model.ema_decay", "0.5",
)  # fmt: skip
SFT = (
    "--trainer.loss.estimator", "sft", "--trainer.loss.adv_tau", "0",
    "--trainer.loss.student_tau", "0",
)  # fmt: skip
FULL_WEIGHTS = "--no-trainer.model.lora"
ADAPTER = Path("adapter/adapter_model.safetensors")


@pytest.mark.parametrize("flags", [(), EMA, SFT], ids=["hybrid", "ema", "sft"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "resumed"
    assert run(whole, *FROM_TEACHER, *flags) == EXIT_OK
    shown = capsys.readouterr().out
    assert "samples    the teacher's, with the context (off-policy)" in shown
    assert ("mode       supervised: 0.5 log π of the teacher's samples" in shown) == (flags == SFT)
    steps = [record for record in records(whole) if "loss/total" in record]
    assert steps[-1]["kl/forward"] < 0.95 * steps[0]["kl/forward"]
    rewards = [step["reward/mean"] for step in steps]
    if flags != EMA:
        assert min(rewards) > 0.7, "of the teacher's completions"
    original = loop.train_step

    def breaks_at_4(session: Any, step: int) -> None:
        if step == 4:
            raise RuntimeError("it broke")
        original(session, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", breaks_at_4)
        assert run(path, *FROM_TEACHER, *flags) == EXIT_FAILED
    capsys.readouterr()
    assert run(path, *flags, "--resume") == EXIT_USAGE
    assert "sample_from" in capsys.readouterr().err
    assert run(path, *FROM_TEACHER, *flags, "--resume") == EXIT_OK
    assert records(path) == records(whole)
    assert board(path) == board(whole)
    ours, theirs = load_file(path / ADAPTER), load_file(whole / ADAPTER)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_teacher_that_is_another_model_samples(tmp_path: Path) -> None:
    """In the trainer, with its own weights: it has those of the student, scaled by 1.05."""
    scaled_copy(tmp_path / "other", 1.05)
    other = ("--teacher_inference.model.name", str(tmp_path / "other"), "--max_steps", "2")
    assert run(tmp_path / "run", *FROM_TEACHER, *other) == EXIT_OK
    steps = [record for record in records(tmp_path / "run") if "loss/total" in record]
    assert len(steps) == 2
    assert all(step["kl/sampler_mismatch"] < 1e-8 for step in steps)
    assert all(step["kl/forward"] > 0.01 for step in steps)


@pytest.mark.parametrize(
    ("flags", "fits"),
    [
        ((), True),
        (EMA, True),
        ((FULL_WEIGHTS, "--orchestrator.teacher_model.update", "live"), True),
        ((FULL_WEIGHTS,), False),
        ((FULL_WEIGHTS, "--trainer.loss.estimator", "sampled"), True),
    ],
)
def test_async_needs_an_engine_with_the_teachers_weights(
    flags: tuple[str, ...], fits: bool
) -> None:
    """Every weight is trained: a frozen teacher of `full` is in the trainer alone."""
    if fits:
        plan_on_gpus("--schedule", "async", *FROM_TEACHER, *flags)
        return
    plan_on_gpus("--schedule", "async", *flags)
    with pytest.raises(UserError, match="the trainer itself samples") as caught:
        plan_on_gpus("--schedule", "async", *FROM_TEACHER, *flags)
    assert "let an engine have the teacher's weights" in caught.value.fix


def test_likeliest_ids_are_the_students(configure: Configure) -> None:
    """The sampler's are the teacher's then, so the trainer scores those that it finds itself."""
    machine = Machine(gpus=2, bytes=80 * GIB, vllm=True, bf16=True)
    flags = ("--trainer.loss.estimator", "top_k")
    assert plan_run(configure(*flags), machine).placement.teacher.scorer == "engine"
    teacher = plan_run(configure(*flags, *FROM_TEACHER), machine).placement.teacher
    assert (teacher.scorer, teacher.estimator.name) == ("trainer", "top_k")
    assert "not the student's" in teacher.reason


def test_the_plan_says_who_samples(configure: Configure) -> None:
    machine = Machine(gpus=2, bytes=80 * GIB, vllm=True, bf16=True)

    def plan(*flags: str) -> Plan:
        return plan_run(configure("--trainer.loss.estimator", "sampled", *flags), machine)

    ours, theirs = plan(*FROM_TEACHER), plan()
    assert as_json(ours)["sample_from"] == "teacher"
    assert as_json(theirs)["sample_from"] == "student"
    assert ours.work["sample"] == theirs.work["sample"], "the same weights"
    assert ours.work["teacher"].flops == 0 < theirs.work["teacher"].flops
    assert ours.timing is not None
    assert theirs.timing is not None
    assert ours.timing.teacher == 0 < theirs.timing.teacher
    assert ours.timing.sample == theirs.timing.sample


def test_the_teacher_must_end_its_turns_as_the_student_does(configure: Configure) -> None:
    """With templates that end a turn with different tokens the student would learn the other."""
    loaded = configure(*FROM_TEACHER)
    lab = make_lab(loaded, trained=False)
    prompts = [rollout.prompt for rollout in lab.rollouts]
    check_prompts(loaded.config, lab.builder, prompts)
    lab.builder.end_of_turn_ids = frozenset({2, 5})
    check_prompts(configure().config, lab.builder, prompts)
    with pytest.raises(UserError, match="end a turn with different tokens") as caught:
        check_prompts(loaded.config, lab.builder, prompts)
    assert (caught.value.where, caught.value.exit_code) == ("orchestrator.sample_from", EXIT_USAGE)
