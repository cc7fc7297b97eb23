"""Properties of the objective in float64, and the fused objective against plain torch."""

from __future__ import annotations

import pytest
import torch
from support.objective_reference import objective
from torch import Tensor

from minidistill_kernels import linear_distill

V = 7


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize(("teacher_tau", "student_tau"), [(0.5, 0.5), (1.0, 0.5), (0.3, 1.0)])
def test_the_expected_sampled_gradient_is_the_full_gradient(
    teacher_tau: float, student_tau: float
) -> None:
    """The expectation is over every token, each with its own advantage."""
    z = logits(1, V).requires_grad_()
    teacher = logits(1, V, seed=1)
    advantage = logits(V, seed=2)
    taus = {"adv_tau": 0.7, "teacher_tau": teacher_tau, "student_tau": student_tau}
    ids = torch.arange(V)
    z_VV = z.expand(V, V)
    pi = torch.log_softmax(z, -1)[0].exp().detach()

    def expected(estimator: str) -> Tensor:
        settings = {"estimator": estimator, "advantage_N": advantage, **taus}
        out = objective(z_VV, teacher.expand(V, V), ids, **settings)
        return gradient((pi * out.loss).sum(), z)

    torch.testing.assert_close(expected("sampled"), expected("full"), rtol=1e-12, atol=1e-14)


def test_the_full_gradient_matches_its_formula_and_finite_differences() -> None:
    z, teacher = logits(1, V).requires_grad_(), logits(1, V, seed=1)
    taus = {"adv_tau": 0.0, "teacher_tau": 0.8, "student_tau": 0.3}

    def loss(logits: Tensor) -> Tensor:
        return objective(logits, teacher, torch.tensor([2]), estimator="full", **taus).loss.sum()

    grad = gradient(loss(z), z)[0]
    pi = z[0].softmax(-1)
    b = 0.3 * z[0] - 0.8 * teacher[0]
    torch.testing.assert_close(grad, (pi * (b - (pi * b).sum())).detach(), rtol=1e-12, atol=1e-14)
    step = 1e-6
    for v in range(V):
        nudge = torch.zeros(1, V, dtype=torch.float64)
        nudge[0, v] = step
        difference = (loss(z + nudge) - loss(z - nudge)).detach() / (2 * step)
        assert abs(float(difference - grad[v])) < 1e-8


def test_the_expected_gradient_of_k1_is_zero_and_of_k3_the_forward_kls() -> None:
    """Neither can be the loss: their expected gradients are not the reverse KL's."""
    z, teacher = logits(V).requires_grad_(), logits(V, seed=1)
    t = teacher.log_softmax(-1)
    pi = z.softmax(-1).detach()
    k1 = gradient((pi * (z.log_softmax(-1) - t)).sum(), z)
    assert float(k1.abs().max()) < 1e-15
    ratio = t - z.log_softmax(-1)
    k3 = gradient((pi * (ratio.exp() - 1 - ratio)).sum(), z)
    forward = gradient((t.exp() * (t - z.log_softmax(-1))).sum(), z)
    torch.testing.assert_close(k3, forward, rtol=1e-12, atol=1e-14)
    s = z.log_softmax(-1)
    reverse = gradient((s.exp() * (s - t)).sum(), z)
    assert float((k3 - reverse).abs().max()) > 0.01


@pytest.mark.parametrize(("teacher_tau", "student_tau"), [(1.0, 0.5), (0.5, 0.5), (0.5, 1.0)])
def test_the_fixed_point_is_the_teacher_raised_to_the_ratio_of_taus(
    teacher_tau: float, student_tau: float
) -> None:
    teacher = logits(1, V, seed=1)
    target = (teacher_tau / student_tau * teacher.log_softmax(-1)).log_softmax(-1)
    taus = {"adv_tau": 0.0, "teacher_tau": teacher_tau, "student_tau": student_tau}
    z = target.clone().requires_grad_()
    loss = objective(z, teacher, torch.tensor([0]), estimator="full", **taus).loss.sum()
    assert float(gradient(loss, z).abs().max()) < 1e-15
    z = logits(1, V, seed=5).requires_grad_()
    for _ in range(1000):
        loss = objective(z, teacher, torch.tensor([0]), estimator="full", **taus).loss.sum()
        z = (z - 4 * gradient(loss, z)).detach().requires_grad_()
    torch.testing.assert_close(z.log_softmax(-1).detach(), target, atol=1e-4, rtol=0)


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_without_a_context_there_is_nothing_to_learn(estimator: str) -> None:
    z = logits(5, V).requires_grad_()
    ids = torch.tensor([0, 1, 2, 3, 6])
    out = objective(z, z.detach(), ids, estimator=estimator, top_k=3)
    assert float(out.loss.detach().abs().max()) < 1e-15
    assert float(gradient(out.loss.sum(), z).abs().max()) < 1e-15
    assert float(out.kl.abs().max()) < 1e-15


CASES = [
    {"estimator": "full"},
    {"estimator": "full", "teacher_tau": 1.0, "student_tau": 0.5, "temperature": 0.7},
    {"estimator": "full", "kl_clip": 0.4},
    {"estimator": "sampled", "kl_clip": 0.5},
    {"estimator": "sampled", "teacher_tau": 1.0, "adv_tau": 0.0},
    {"estimator": "top_k", "top_k": 5},
    {"estimator": "top_k", "top_k": 3, "student_tau": 0.2},
    {"estimator": "full", "ratio_clip_high": 1.1, "token_mask_low": 0.8, "token_mask_high": 1.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_objective_equals_plain_torch(case: dict) -> None:
    """Values and gradients agree, with ratios that are clipped and masked."""
    n, h, v = 40, 8, 30
    hidden, teacher = logits(n, h).float(), logits(n, h, seed=1).float()
    weight = logits(v, h, seed=2).float() * 0.5
    ids = torch.randint(v, (n,), generator=torch.Generator().manual_seed(3))
    advantage = logits(n, seed=4).float()
    exact = hidden.double().requires_grad_()
    z, zt = exact @ weight.double().T, teacher.double() @ weight.double().T
    temperature = case.get("temperature", 1.0)
    sampler = (z / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0].detach()
    sampler = sampler - logits(n, seed=6) * 0.3
    plain = objective(z, zt, ids, advantage_N=advantage.double(), sampler_logp_N=sampler, **case)
    hidden.requires_grad_()
    fused = linear_distill(
        hidden, weight, ids, h_t_NH=teacher, advantage_N=advantage,
        sampler_logp_N=sampler.float(), **case,
    )  # fmt: skip
    assert torch.equal(fused.masked, plain.masked)
    pairs = [(fused.loss, plain.loss), (fused.kl, plain.kl), (fused.logp, plain.logp)]
    pairs += [(fused.teacher_logp, plain.teacher_logp), (fused.ratio, plain.ratio)]
    for ours, reference in pairs:
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=2e-5)
    weights = logits(n, seed=7)
    ours = gradient((fused.loss * weights.float()).sum(), hidden)
    reference = gradient((plain.loss * weights).sum(), exact)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=2e-5)
