"""Full fine-tuning: gradients, teachers, the saved model, half precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import NO_MISMATCH_LIMIT, SMALL_STEP, Lab, make_lab
from support.other_model import scaled_copy
from support.plain_forward import completion_logits, completion_logprobs, step_loss
from support.runs import board, records, run

from minidistill.errors import EXIT_OK
from minidistill.trainer import checkpoint
from minidistill.trainer.optim import Optimizer
from minidistill.trainer.policy import Weights
from minidistill.types import Role

FULL = (
    "--no-trainer.model.lora", "--trainer.optim.lr", "5e-4", *SMALL_STEP, *NO_MISMATCH_LIMIT,
)  # fmt: skip
UPDATE = "--orchestrator.teacher_model.update"
Configure = Callable[..., Any]


def take_step(lab: Lab, step: int = 1) -> None:
    lab.trainer.step(lab.rollouts, step, lambda count: None)


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
@pytest.mark.parametrize("update", ["frozen", "live"])
def test_the_gradient_of_every_weight(configure: Configure, estimator: str, update: str) -> None:
    """Against transformers' logits and autograd, including the tied head's part."""
    flags = ("--trainer.loss.estimator", estimator, "--trainer.loss.top_k", "4", UPDATE, update)
    lab = make_lab(configure(*FULL, *flags, "--trainer.loss.kl_clip", "off"))
    policy = lab.policy
    model = policy.model
    teacher_model = policy.reference_models[Weights.BASE] if update == "frozen" else model
    assert (Weights.BASE in policy.reference_models) == (update == "frozen")
    teacher_logits = partial(completion_logits, teacher_model)
    loss = step_loss(lab.rollouts, model, teacher_logits, estimator=estimator, top_k=4)
    parameters = dict(policy.parameters)
    assert len(parameters) == len(list(model.parameters())), "a weight is not trained"
    expected = torch.autograd.grad(loss, list(parameters.values()))
    gradients = lab.gradients()
    scale = max(float(g.abs().max()) for g in expected)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            gradients[name], gradient, rtol=2e-3, atol=3e-5 * max(scale, 1.0)
        )


def test_the_frozen_teacher_stays_the_base(configure: Configure) -> None:
    lab = make_lab(configure(*FULL), trained=False)
    teacher = {
        n: p.clone() for n, p in lab.policy.reference_models[Weights.BASE].named_parameters()
    }
    start = {n: p.clone() for n, p in lab.policy.parameters}
    assert all(torch.equal(teacher[n], p) for n, p in start.items())
    for step in (1, 2):
        take_step(lab, step)
    assert lab.trainer.prefixes.computed == 1, "the context is prefilled once a run"
    after = dict(lab.policy.reference_models[Weights.BASE].named_parameters())
    assert all(torch.equal(after[n], p) for n, p in teacher.items())
    assert all(not torch.equal(p, start[n]) for n, p in lab.policy.parameters)


def test_an_averaged_teacher(configure: Configure) -> None:
    flags = (UPDATE, "ema", "--orchestrator.teacher_model.ema_decay", "0.75")
    lab = make_lab(configure(*FULL, *flags), trained=False)
    average = dict(lab.policy.reference_models[Weights.EMA].named_parameters())
    before = {n: p.clone() for n, p in average.items()}
    take_step(lab)
    for name, parameter in lab.policy.parameters:
        torch.testing.assert_close(average[name], 0.75 * before[name] + 0.25 * parameter)
        assert not average[name].requires_grad
    assert not lab.policy.holds(Role.BASE)


def test_the_saved_model_loads_with_transformers(configure: Configure, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lab = make_lab(configure(*FULL))
    take_step(lab)
    folder = checkpoint.save_model(lab.policy, tmp_path)
    assert folder == tmp_path / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([lab.rollouts[0].prompt.teacher_ids])
    with torch.no_grad():
        ours = lab.policy.model(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == lab.policy.tokenizer.get_vocab()


@pytest.mark.parametrize("update", ["frozen", "ema"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, update: str) -> None:
    """Without the files written after step 2, a resumed run gives the same metrics and board."""
    flags = (*FULL[:3], UPDATE, update, "--trainer.scheduler.decay_steps", "6")
    assert run(tmp_path / "whole", *flags, "--max_steps", "4") == EXIT_OK
    path = tmp_path / "cut"
    assert run(path, *flags, "--max_steps", "4") == EXIT_OK
    (path / "scoreboard.json").unlink()
    for folder in ("checkpoints/step_000004", "model"):
        shutil.rmtree(path / folder)
    assert run(path, *flags, "--max_steps", "4", "--resume") == EXIT_OK
    assert records(path) == records(tmp_path / "whole")
    assert board(path) == board(tmp_path / "whole")


def test_half_precision_keeps_small_updates(configure: Configure) -> None:
    """Updates below bfloat16's resolution add up in the fp32 copy, which a checkpoint keeps."""
    config = configure(*FULL, "--model.dtype", "bfloat16", "--trainer.optim.lr", "1e-4").config
    lab = make_lab(configure(*FULL, "--model.dtype", "bfloat16"), trained=False)
    name = "model.norm.weight"
    weight = dict(lab.policy.parameters)[name]
    assert weight.dtype == torch.bfloat16
    optimizer = lab.trainer.optimizer
    for tensor in (weight, optimizer.masters[name]):
        tensor.data.fill_(1.0)
    for step in range(100):
        weight.sum().backward()
        assert optimizer.clip() > 0
        optimizer.step(1e-4)
        if step == 0:
            assert (weight == 1.0).all(), "one update is below the resolution"
    assert (weight < 0.995).all()
    torch.testing.assert_close(optimizer.masters[name], weight.float(), rtol=4e-3, atol=0)
    again = Optimizer(lab.policy, config)
    again.load_state(optimizer.state().items())
    assert torch.equal(again.masters[name], optimizer.masters[name])
    assert again.state().keys() == optimizer.state().keys()


def test_a_teacher_from_another_model_in_the_trainer(configure: Configure, tmp_path: Path) -> None:
    """It has its own weights and head. The student's base is kept for the drift."""
    other = scaled_copy(tmp_path, 1.1)
    lab = make_lab(
        configure(*SMALL_STEP, *NO_MISMATCH_LIMIT, "--teacher_inference.model.name", str(tmp_path))
    )
    assert lab.policy.lora
    assert lab.policy.holds(Role.BASE)
    prompts = [r.prompt.teacher_ids for r in lab.rollouts]
    completions = [r.completion.token_ids for r in lab.rollouts]
    scores = lab.engine.score(prompts, completions, Role.TEACHER)
    logp = []
    for prompt, completion, logprobs in zip(prompts, completions, scores, strict=True):
        expected = completion_logprobs(other, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
        logp.append(expected)
    tokens = lab.trainer.step(lab.rollouts, 1, lambda count: None).tokens
    torch.testing.assert_close(
        torch.cat([t.teacher_logp for t in tokens]), torch.cat(logp), rtol=0, atol=1e-4
    )
