"""The estimator `sft`: its loss and gradient in float64, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.paths import SOKOBAN

from minidistill.config import load_config
from minidistill.errors import UserError
from minidistill.estimators import SFT
from minidistill.trainer.objective import loss_settings
from minidistill_kernels import Head

Configure = Callable[..., Any]
PURE = ("--trainer.loss.adv_tau", "0", "--trainer.loss.student_tau", "0")
CHOSEN = ("--trainer.loss.estimator", "sft", *PURE)
FROM_TEACHER = ("--orchestrator.sample_from", "teacher")
TAU, TEMPERATURE = 0.7, 0.8


@pytest.mark.parametrize("scored", ["trainer", "engine"])
def test_the_loss_is_the_cross_entropy_of_a_float64_reference(scored: str) -> None:
    """Samples that the student would almost never have drawn are learned from like any other."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden_NH, teacher_NH, head_VH = normal(12, 8).requires_grad_(), normal(12, 8), normal(30, 8)
    ids_N = torch.randint(0, 30, (12,), generator=generator)
    flags = ("--trainer.loss.teacher_tau", f"{TAU}")
    flags += ("--orchestrator.sampling.temperature", f"{TEMPERATURE}")
    settings = loss_settings(load_config([SOKOBAN, *CHOSEN, *FROM_TEACHER, *flags]).config, SFT, 30)
    teacher_logp_N = torch.log_softmax(teacher_NH @ head_VH.T / TEMPERATURE, -1)[range(12), ids_N]
    by_engine = {"teacher_logp_N": teacher_logp_N}
    output = SFT.loss_function(settings)(
        hidden_NH,
        Head(head_VH),
        ids_N,
        **({"h_t_NH": teacher_NH} if scored == "trainer" else by_engine),
        advantage_N=normal(12),
        sampler_logp_N=torch.full((12,), -0.01),
    )
    output.loss.sum().backward()

    exact_NH = hidden_NH.detach().double().requires_grad_()
    logp_NV = torch.log_softmax(exact_NH @ head_VH.double().T / TEMPERATURE, -1)
    expected_N = -TAU * logp_NV[range(12), ids_N]
    expected_N.sum().backward()
    assert float(expected_N.detach().max()) > TAU * 8, "a ratio to the sampler far below the mask"
    torch.testing.assert_close(output.loss.double(), expected_N, rtol=1e-5, atol=1e-6)
    assert hidden_NH.grad is not None
    assert exact_NH.grad is not None
    torch.testing.assert_close(hidden_NH.grad.double(), exact_NH.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.teacher_logp, teacher_logp_N, rtol=1e-5, atol=1e-5)
    assert not output.masked.any()
    assert SFT.split(output, torch.ones(12), settings) == (0.0, float(output.loss.detach().mean()))


@pytest.mark.parametrize(
    ("flags", "where", "fix"),
    [
        (CHOSEN, "trainer.loss.estimator", 'orchestrator.sample_from = "teacher"'),
        ((*CHOSEN, *FROM_TEACHER, "--trainer.loss.adv_tau", "0.5"), "adv_tau", "adv_tau = 0"),
        (
            (*CHOSEN, *FROM_TEACHER, "--trainer.loss.student_tau", "1"),
            "student_tau",
            "student_tau = 0",
        ),
        ((*CHOSEN, *FROM_TEACHER, "--trainer.loss.kl_clip", "5"), "kl_clip", 'kl_clip = "off"'),
        (
            (*CHOSEN, *FROM_TEACHER, "--trainer.loss.ratio_clip_high", "5"),
            "ratio_clip_high",
            "ratio_clip_high = 2.0",
        ),
        (
            (*FROM_TEACHER, "--trainer.loss.token_mask_low", "0.2"),
            "token_mask_low",
            'orchestrator.sample_from = "student"',
        ),
    ],
)
def test_what_would_be_ignored_is_refused(flags: tuple[str, ...], where: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([SOKOBAN, *flags])
    assert where in caught.value.where
    assert fix in caught.value.fix


def test_the_masks_are_off_for_samples_of_the_teacher(configure: Configure) -> None:
    config = configure(*FROM_TEACHER).config
    settings = loss_settings(config, SFT, 640)
    assert (settings.token_mask_low, settings.token_mask_high) == (0.0, float("inf"))
    settings = loss_settings(configure().config, SFT, 640)
    assert (settings.token_mask_low, settings.token_mask_high) == (0.125, 8.0)
