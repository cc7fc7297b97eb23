"""Inputs and comparisons shared by the tests of minidistill_kernels."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from minidistill_kernels import linear_distill, reference

INTERPRETED = os.environ.get("MINIDISTILL_KERNELS") == "interpret"
searched = settings(
    deadline=None,
    derandomize=True,
    max_examples=12 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.too_slow],
)
# The interpreter truncates fp32 to bf16, where a GPU rounds.
BF16_GRADIENT = 6e-3 if INTERPRETED else 5e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2 distance over the L2 norm of `want`."""
    return float((got.detach().double() - want.detach().double()).norm() / want.double().norm())


def furthest(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max())


def make_case(
    n: int,
    v: int,
    h: int,
    *,
    dtype: torch.dtype = torch.float32,
    gap: float = 0.3,
    seed: int = 0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Hidden states and heads of student and teacher, ids, advantages, a sampler's log-probs."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    h_s = normal(n, h)
    weight = normal(v, h) * 2.5 / h**0.5
    ids = torch.randint(0, v, (n,), generator=draw)
    ids[0], ids[-1] = v - 1, 0
    out = {
        "h_s": h_s.to(dtype),
        "h_t": (h_s + gap * normal(n, h)).to(dtype),
        "weight": weight.to(dtype),
        "teacher_head": (normal(v, h) * 2.5 / h**0.5).to(dtype),
        "ids": ids,
        "advantage": normal(n),
    }
    logits = out["h_s"].double() @ out["weight"].double().t()
    logp, _ = reference.selective_logprob(logits, ids, temperature)
    out["sampler"] = (logp + 0.4 * normal(n)).float()
    return out


def run_both(
    case: dict[str, Tensor], **options: Any
) -> tuple[Any, Tensor, dict[str, Tensor], Tensor]:
    """Outputs of linear_distill and of its reference, and their gradients of a weighted sum."""
    upstream = torch.linspace(0.5, 1.5, len(case["ids"]))
    ours = case["h_s"].clone().requires_grad_()
    got = linear_distill(ours, case["weight"], case["ids"], **options)
    (got.loss * upstream).sum().backward()
    options.pop("chunk", None)
    truth = case["h_s"].double().requires_grad_()
    want = reference.linear_distill(truth, case["weight"], case["ids"], **options)
    (want["loss"] * upstream).sum().backward()
    assert ours.grad is not None
    assert truth.grad is not None
    return got, ours.grad, want, truth.grad


def assert_same_outputs(got: Any, want: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Every field agrees within `tolerance`, relative where the ratio is a factor."""
    for name, value in got._asdict().items():
        if value is None:
            assert want[name] is None
        elif value.dtype == torch.bool:
            assert torch.equal(value, want[name]), name
        else:
            scale = want[name].abs().clamp(min=1.0) if name in ("loss", "ratio") else 1.0
            error = float(((value.double() - want[name]).abs() / scale).max())
            assert error <= tolerance, f"{name}: {error:.1e}"
