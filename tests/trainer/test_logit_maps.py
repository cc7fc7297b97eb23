"""Models that scale, cap or shift their logits: gradients against float64, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import Lab, make_lab
from support.plain_forward import completion_logits, step_loss
from support.tiny_models import build
from support.tiny_runs import write_config

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer.head import LogitMap, find_logit_map
from minidistill.trainer.policy import Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Role

TAUS = {"adv_tau": 0.5, "teacher_tau": 1.0, "student_tau": 0.7}
MAPS = {
    "granite": LogitMap(1 / 8),
    "cohere": LogitMap(0.25),
    "gemma2": LogitMap(cap=5.0),
    "phi": LogitMap(),  # and a bias
    "falcon_h1": LogitMap(0.5),
}


def lab_of(name: str, folder: Path, *flags: str) -> Lab:
    taus = [word for key, tau in TAUS.items() for word in (f"--trainer.loss.{key}", str(tau))]
    config = write_config(folder, build(name, folder))
    rewards = (
        "--orchestrator.env.0.args.reward",
        "exact",
        "--no-orchestrator.buffer.skip_verification",
    )
    lab = make_lab(load_config([config, *taus, *rewards, *flags]))
    signs = [(-1) ** i for i in range(len(lab.rollouts))]
    lab.rollouts = [replace(r, advantage=0.8 * s) for r, s in zip(lab.rollouts, signs, strict=True)]
    return lab


def in_float64(lab: Lab) -> tuple[Any, Callable[..., torch.Tensor]]:
    """The student's model and a function of the teacher's logits, in float64."""
    student = copy.deepcopy(lab.policy.model).double()
    if lab.policy.lora:

        def teacher_logits(*sequence: Any) -> torch.Tensor:
            with student.disable_adapter():
                return completion_logits(student, *sequence)

        return student, teacher_logits
    base = copy.deepcopy(lab.policy.reference_models[Weights.BASE]).double()
    return student, lambda *sequence: completion_logits(base, *sequence)


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "phi"])
def test_the_gradient_of_a_step(name: str, estimator: str, tmp_path: Path) -> None:
    settings = ("--trainer.loss.estimator", estimator, "--trainer.loss.top_k", "8")
    lab = lab_of(name, tmp_path, *settings, "--orchestrator.sampling.temperature", "0.8")
    check_gradients(lab, estimator=estimator, top_k=8, temperature=0.8)


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_the_gradient_of_every_weight(name: str, tmp_path: Path) -> None:
    lab = lab_of(name, tmp_path, "--no-trainer.model.lora")
    assert any("lm_head" in name or "embed" in name for name, _ in lab.policy.parameters)
    check_gradients(lab, estimator="full")


def check_gradients(lab: Lab, **options: Any) -> None:
    student, teacher_logits = in_float64(lab)
    clip = 5.0 if options["estimator"] == "sampled" else None
    step_loss(lab.rollouts, student, teacher_logits, kl_clip=clip, **TAUS, **options).backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    gradients = lab.gradients()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.double(), expected[name], rtol=2e-4, atol=2e-5 * largest
        )


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "phi"])
def test_the_kl_outside_of_training(name: str, tmp_path: Path) -> None:
    lab = lab_of(name, tmp_path)
    student, teacher_logits = in_float64(lab)
    completions = [r.completion.token_ids for r in lab.rollouts]
    views = (
        [r.prompt.student_ids for r in lab.rollouts],
        [r.prompt.teacher_ids for r in lab.rollouts],
    )
    got_N = token_kl(
        lab.policy, completions, prompts=views, roles=(Role.STUDENT, Role.TEACHER),
        temperature=0.7, budget=TokenBudget(256), doing="testing",
    )  # fmt: skip
    expected = []
    with torch.no_grad():
        for completion, first, second in zip(completions, *views, strict=True):
            logp, logq = (
                (logits / 0.7).log_softmax(-1)
                for logits in (
                    completion_logits(student, first, completion),
                    teacher_logits(second, completion),
                )
            )
            expected.append((logp.exp() * (logp - logq)).sum(-1))
    torch.testing.assert_close(got_N.double(), torch.cat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_the_scale_and_the_cap_are_found(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build(name, tmp_path), dtype=dtype)
    assert find_logit_map(model) == MAPS[name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda logits: 0.37 * logits, "0.37 times the product"),
        (lambda logits: logits + logits.abs().sqrt(), "times the product"),
        (lambda logits: logits * float("nan"), "nan times the product"),
    ],
)
def test_logits_that_the_configuration_does_not_explain_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], named: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build("llama", tmp_path))
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))
    with pytest.raises(UserError, match=named) as caught:
        find_logit_map(model)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
