"""Log-probs and reverse KL from hidden states and a frozen LM head, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks
from minidistill_kernels.head import Head
from minidistill_kernels.op import METRICS, head_arguments, linear_op

# ratio_clip_high, token_mask_low and token_mask_high: unused, no ratio and no mask here.
_NO_MASK = (2.0, 0.0, float("inf"))


class _RefuseGradient(torch.autograd.Function):
    """Identity that raises in the backward pass, so an entropy bonus is not silently dropped."""

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
    weight: Tensor | Head,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    return_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at `ids`, without (N, V) logits.

    Args:
        hidden: (N, H) float32, bfloat16 or float16; differentiable.
        weight: (V, H) frozen head, same dtype, or a `Head`.
        ids: (N,) int64 or int32; -100 is padding.
        valid: (N,) bool; rows that are False are not computed and are 0.
        return_entropy: also return the entropy of each row. Its backward pass raises.
        chunk: tokens at a time; None fits 32 MiB of fp32 logits on a CPU, 1 GiB on CUDA. It has no
            effect on CUDA without a gradient, where there are no logits unless the head has a bias
            or a cap.

    Returns:
        (N,) fp32 log-probs, and (N,) fp32 entropies in nats or None.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, an id is out of range, or the
            head requires a gradient.
    """
    checks.matrix("hidden", hidden)
    head = checks.head("weight", weight, "hidden", hidden).detach()
    checks.per_token("ids", ids, hidden.shape[0], hidden.device, "ids")
    checks.positive("temperature", temperature)
    if valid is not None:
        checks.per_token("valid", valid, hidden.shape[0], hidden.device, "bool")
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    size = checks.chunk_size(chunk)
    scaled_temperature = float(temperature) / head.scale
    only_product = head.bias_V is None and head.cap is None
    if only_product and not need_grad and backend.backend_for(hidden.device) == "triton":
        from minidistill_kernels.triton_score import score_op

        logp, entropy = score_op(hidden.detach(), head.weight_VH, ids, valid, scaled_temperature)
        return logp, entropy if return_entropy else None
    settings = [0.0, 0.0, 0.0, scaled_temperature, *_NO_MASK]
    logp, metrics, *_ = linear_op(
        hidden,
        head.weight_VH,
        ids,
        *head_arguments(head, None, None),
        *[None] * 5,  # no advantage, no sampler, no scores from elsewhere
        valid,
        "logprob",
        1,
        settings,
        None,
        size,
        need_grad,
        False,
    )
    entropy = metrics[METRICS.index("entropy")]
    # torch.compile traces the backward pass of every output, also of those that are not used.
    if return_entropy and need_grad and not torch.compiler.is_compiling():
        entropy = _RefuseGradient.apply(entropy, hidden)
    return logp, entropy if return_entropy else None


def linear_reverse_kl(
    h_s: Tensor,
    h_t: Tensor,
    weight: Tensor | Head,
    teacher_weight: Tensor | Head | None = None,
    *,
    student_tau: float = 1.0,
    teacher_tau: float = 1.0,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum_v pi_v (student_tau log pi_v - teacher_tau log q_v) from two sets of hidden states.

    pi = softmax(h_s @ weight.T / temperature), and q is the same of `h_t` and the teacher's head.
    With both taus 1 this is KL(pi || q). With one head the difference of the logits is computed
    from the difference of the hidden states, so a small divergence stays accurate in bfloat16.

    Args:
        h_s: (N, H) float32, bfloat16 or float16; differentiable.
        h_t: (N, H), same dtype; must not require a gradient. (N, H_t) with a `teacher_weight`.
        weight: (V, H) frozen head, same dtype, or a `Head`.
        teacher_weight: (V, H_t) the teacher's own frozen head, if it is not the student's.
        valid: (N,) bool; rows that are False are not computed and are 0.
        chunk: tokens at a time; None fits 32 MiB of fp32 logits on a CPU, 1 GiB on CUDA.

    Returns:
        (N,) fp32 divergences in nats.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or a head or the teacher
            requires a gradient.
    """
    names = ("h_s", "weight", "h_t")
    head, teacher_head = checks.heads(h_s, weight, h_t, teacher_weight, names)
    checks.no_gradient("h_t", h_t)
    checks.finite("student_tau", student_tau)
    checks.finite("teacher_tau", teacher_tau)
    checks.positive("temperature", temperature)
    if valid is not None:
        checks.per_token("valid", valid, h_s.shape[0], h_s.device, "bool")
    ids = torch.zeros(h_s.shape[0], dtype=torch.int64, device=h_s.device)
    taus = [0.0, float(teacher_tau), float(student_tau)]
    settings = [*taus, float(temperature) / head.scale, *_NO_MASK]
    need_grad = torch.is_grad_enabled() and h_s.requires_grad
    loss, *_ = linear_op(
        h_s,
        head.weight_VH.detach(),
        ids,
        *head_arguments(head.detach(), h_t, teacher_head),
        *[None] * 5,  # no advantage, no sampler, no scores from elsewhere
        valid,
        "full",
        1,
        settings,
        None,
        checks.chunk_size(chunk),
        need_grad,
        False,
    )
    return loss
