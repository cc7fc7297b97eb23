"""Log-probs and reverse KL straight from hidden states and a frozen LM head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks
from minidistill_kernels.distill import METRICS, linear_op

# Rows of Objective that do not apply outside the trainer's objective: no mask, no truncation.
_OPEN = (2.0, 0.0, float("inf"))


class _RefuseGradient(torch.autograd.Function):
    """Identity whose backward raises: better than an entropy bonus that does nothing."""

    @staticmethod
    def forward(ctx: Any, entropy_N: Tensor, hidden: Tensor) -> Tensor:
        return entropy_N.view_as(entropy_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "linear_logprob computes no gradient of the entropy; use entropy.detach(), "
            "or selective_logprob on logits, which has one"
        )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at `ids`, never holding (N, V) logits.

    Args:
        hidden: (N, H) float32, bfloat16 or float16; takes the gradient.
        weight: (V, H) frozen head, same dtype.
        ids: (N,) int64 or int32; -100 is padding.
        valid: (N,) bool; rows that are False are not computed: 0 and no gradient.
        return_entropy: also the entropy of each row; it has no gradient, asking for it raises.
        chunk: tokens at a time; None fits 64 MiB of fp32 logits on a CPU, 1 GiB on CUDA. Of no
            effect on CUDA without a gradient, where logits never exist.

    Returns:
        (N,) fp32 log-probs, and (N,) fp32 entropies in nats or None.

    Raises:
        ValueError: a bad shape, dtype, device, id or a trainable head; names the argument.
    """
    checks.matrix("hidden", hidden)
    checks.head("weight", weight, "hidden", hidden)
    checks.per_token("ids", ids, hidden.shape[0], hidden.device, "ids")
    checks.positive("temperature", temperature)
    if valid is not None:
        checks.per_token("valid", valid, hidden.shape[0], hidden.device, "bool")
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    size = checks.chunk_size(chunk)
    if not need_grad and backend.backend_for(hidden.device) == "triton":
        from minidistill_kernels.triton_score import score_op

        logp, entropy = score_op(hidden.detach(), weight.detach(), ids, valid, temperature)
        return logp, entropy if return_entropy else None
    settings = [0.0, 0.0, 0.0, float(temperature), *_OPEN]
    logp, metrics, *_ = linear_op(
        hidden, weight.detach(), ids, *[None] * 7, valid, "logprob", 1, settings, None, size,
        need_grad, False,
    )  # fmt: skip
    entropy = metrics[METRICS.index("entropy")]
    # A compiler traces the backward pass of every output, asked for or not: no gradient there.
    if return_entropy and need_grad and not torch.compiler.is_compiling():
        entropy = _RefuseGradient.apply(entropy, hidden)
    return logp, entropy if return_entropy else None


def linear_reverse_kl(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_tau: float = 1.0,
    teacher_tau: float = 1.0,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum_v pi_v (student_tau log pi_v - teacher_tau log q_v) from two sets of hidden states.

    With both taus 1 this is KL(pi || q), pi = softmax(h_s @ weight.T / temperature) and q the same
    of `h_t` and the teacher's head. With one head the logits' difference comes from the difference
    of the hidden states, so that a small divergence keeps its digits in bfloat16.

    Args:
        h_s: (N, H) float32, bfloat16 or float16; takes the gradient.
        h_t: (N, H), same dtype; must not require a gradient. With a `teacher_weight` (V, H_t) of
            its own it may be (N, H_t).
        weight: (V, H) frozen head, same dtype.
        valid: (N,) bool; rows that are False are not computed: 0 and no gradient.
        chunk: tokens at a time; None fits 64 MiB of fp32 logits on a CPU, 1 GiB on CUDA.

    Returns:
        (N,) fp32 divergences in nats.

    Raises:
        ValueError: a bad shape, dtype or device, or a trainable head or teacher.
    """
    checks.states(h_s, weight, h_t, teacher_weight, names=("h_s", "weight", "h_t"))
    checks.no_gradient("h_t", h_t)
    checks.finite("student_tau", student_tau)
    checks.finite("teacher_tau", teacher_tau)
    checks.positive("temperature", temperature)
    if valid is not None:
        checks.per_token("valid", valid, h_s.shape[0], h_s.device, "bool")
    ids = torch.zeros(h_s.shape[0], dtype=torch.int64, device=h_s.device)
    taus = [0.0, float(teacher_tau), float(student_tau), float(temperature), *_OPEN]
    need_grad = torch.is_grad_enabled() and h_s.requires_grad
    loss, *_ = linear_op(
        h_s, weight.detach(), ids, h_t.detach(),
        None if teacher_weight is None else teacher_weight.detach(),
        *[None] * 5, valid, "full", 1, taus, None, checks.chunk_size(chunk), need_grad, False,
    )  # fmt: skip
    return loss
