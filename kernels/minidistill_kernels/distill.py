"""The trainer's call: the whole objective of a token in one pass over the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minidistill_kernels import checks
from minidistill_kernels.linear_op import linear_op

ESTIMATORS = ("full", "sampled", "top_k")


class DistillOutput(NamedTuple):
    """Per-token results, each (N,) and fp32 unless said otherwise; only `loss` has a gradient.

    Everything is 0 (False) on rows that are padding or not valid.
    """

    loss: Tensor
    """The loss term; reduce it yourself."""
    logp: Tensor
    """log pi(y)"""
    teacher_logp: Tensor
    """log q(y). Scored by an engine's top k without `teacher_logp_N`: log q(y) where y is among
    them, else the mass of the rest, an upper bound."""
    kl: Tensor
    """KL(pi || q): exact with `h_t_NH`, over k ids and the rest with an engine's top k,
    log pi(y) - log q(y) with an engine's log q(y)."""
    entropy: Tensor
    """Entropy of the student, nats."""
    teacher_entropy: Tensor | None
    """Entropy of the teacher, nats; None without `h_t_NH`."""
    ratio: Tensor
    """rho = pi(y) / mu(y), before truncation; 1 without `sampler_logp_N`."""
    masked: Tensor
    """bool: rho outside [token_mask_low, token_mask_high]; the token's loss is 0."""
    ratio_clipped: Tensor
    """bool: rho above `ratio_clip_high`."""
    kl_clipped: Tensor
    """bool: the distillation term was bounded by `kl_clip`."""


def linear_distill(
    h_s_NH: Tensor,
    weight_VH: Tensor,
    ids_N: Tensor,
    *,
    h_t_NH: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logp_N: Tensor | None = None,
    topk_ids_NK: Tensor | None = None,
    teacher_topk_logp_NK: Tensor | None = None,
    advantage_N: Tensor | None = None,
    sampler_logp_N: Tensor | None = None,
    estimator: str = "full",
    top_k: int = 64,
    adv_tau: float = 0.5,
    teacher_tau: float = 0.5,
    student_tau: float = 0.5,
    temperature: float = 1.0,
    ratio_clip_high: float = 2.0,
    token_mask_low: float = 0.125,
    token_mask_high: float = 8.0,
    kl_clip: float | None = None,
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> DistillOutput:
    """Loss and metrics of on-policy distillation, from hidden states and the LM head.

    With pi and q the student's and the teacher's distributions at `temperature`, mu the sampler's,
    A the advantage and rho = min(pi(y) / mu(y), ratio_clip_high), detached:

        full     -rho adv_tau A log pi(y) + sum_v pi_v (student_tau log pi_v - teacher_tau log q_v)
        top_k    the same sum over the student's k likeliest ids and one bucket for the rest
        sampled  -rho [adv_tau A + teacher_tau log q(y) - student_tau log pi(y)] log pi(y),
                 the bracket detached (the policy-gradient form of the reverse KL: Lu et al.,
                 "On-Policy Distillation", 2025)

    Tokens whose pi(y) / mu(y) is outside [token_mask_low, token_mask_high] get no loss and no
    gradient. `kl_clip` bounds the distillation term: clamped to +-kl_clip in `sampled`, scaled
    down to kl_clip otherwise, never dropped. Memory is bounded by `chunk` tokens of logits.

    Args:
        h_s_NH: (N, H) student's hidden states; float32, bfloat16 or float16. Takes the gradient.
        weight_VH: (V, H) head, same dtype. One that requires a gradient gets it, accumulated in
            fp32; the loss must then be reduced by a sum or a mean.
        ids_N: (N,) sampled tokens, int64 or int32; -100 is padding.
        h_t_NH: (N, H) teacher's hidden states, same dtype; detached.
        teacher_weight: (V, H) the teacher's own head, if it is not the student's.
        teacher_logp_N: (N,) log q(y) scored elsewhere; for `sampled` without `h_t_NH`.
        topk_ids_NK: (N, K) the student's likeliest ids, distinct; scored elsewhere by
        teacher_topk_logp_NK: (N, K) log q at those ids. Both for `top_k` without `h_t_NH`.
        advantage_N: (N,) A, centred; None is 0.
        sampler_logp_N: (N,) log mu(y); None makes rho 1.
        estimator: "full" (needs `h_t_NH`), "sampled" or "top_k".
        top_k: k of `top_k` with `h_t_NH`.
        valid: (N,) bool; rows that are False are not computed.
        chunk: tokens at a time; None fits 64 MiB of fp32 logits on a CPU, 1 GiB on CUDA.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, requires a gradient that is not
            computed (a teacher's head), has no rows, or an id is out of range; names the argument.
    """
    n = h_s_NH.shape[0]
    checks.states(h_s_NH, weight_VH, h_t_NH, teacher_weight, trained=True)
    device = h_s_NH.device
    checks.per_token("ids_N", ids_N, n, device, "ids")
    given = {
        "advantage_N": advantage_N,
        "sampler_logp_N": sampler_logp_N,
        "teacher_logp_N": teacher_logp_N,
    }
    for name, x in given.items():
        if x is not None:
            checks.per_token(name, x, n, device, "float")
    if valid is not None:
        checks.per_token("valid", valid, n, device, "bool")
    _check_teacher(estimator, h_t_NH, teacher_logp_N, topk_ids_NK, teacher_topk_logp_NK)
    if topk_ids_NK is not None and teacher_topk_logp_NK is not None:
        _check_top_k(topk_ids_NK, teacher_topk_logp_NK, n, device)
    _check_numbers(top_k, temperature, ratio_clip_high, token_mask_low, token_mask_high, kl_clip)
    for name, tau in (("adv_tau", adv_tau), ("teacher_tau", teacher_tau)):
        checks.finite(name, tau)
    checks.finite("student_tau", student_tau)
    settings = (
        adv_tau, teacher_tau, student_tau, temperature,
        ratio_clip_high, token_mask_low, token_mask_high,
    )  # fmt: skip
    others = (
        h_t_NH, teacher_weight, advantage_N, sampler_logp_N,
        teacher_logp_N, topk_ids_NK, teacher_topk_logp_NK, valid,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    loss, metrics, flags, *_ = linear_op(
        h_s_NH,
        weight_VH,
        ids_N,
        *(None if x is None else x.detach() for x in others),
        estimator,
        top_k,
        [float(x) for x in settings],
        None if kl_clip is None else float(kl_clip),
        checks.chunk_size(chunk),
        grad and (h_s_NH.requires_grad or weight_VH.requires_grad),
        grad and weight_VH.requires_grad,
    )
    logp, teacher_logp, kl, entropy, teacher_entropy, ratio = metrics.unbind(0)
    return DistillOutput(
        loss,
        logp,
        teacher_logp,
        kl,
        entropy,
        None if h_t_NH is None else teacher_entropy,
        ratio,
        *flags.unbind(0),
    )


def _check_teacher(
    estimator: str, h_t: Tensor | None, logp: Tensor | None, ids: Tensor | None, top: Tensor | None
) -> None:
    """The teacher comes one way, and one that the estimator can use."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if (ids is None) != (top is None):
        missing = "topk_ids_NK" if ids is None else "teacher_topk_logp_NK"
        raise ValueError(f"{missing}: topk_ids_NK and teacher_topk_logp_NK come together")
    if h_t is not None and (logp is not None or ids is not None):
        extra = "teacher_logp_N" if logp is not None else "topk_ids_NK"
        raise ValueError(f"{extra}: given as well as h_t_NH; the teacher is scored one way")
    if ids is not None and estimator != "top_k":
        raise ValueError(f"topk_ids_NK: not used by estimator {estimator!r}")
    if estimator == "full" and h_t is None:
        raise ValueError("h_t_NH: estimator 'full' needs the teacher's hidden states")
    if estimator == "sampled" and h_t is None and logp is None:
        raise ValueError("teacher_logp_N: estimator 'sampled' needs it, or h_t_NH")
    if estimator == "top_k" and h_t is None and ids is None:
        raise ValueError("topk_ids_NK: estimator 'top_k' needs it, or h_t_NH")


def _check_top_k(ids: Tensor, logp: Tensor, rows: int, device: torch.device) -> None:
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise ValueError(f"topk_ids_NK: shape {tuple(ids.shape)}, expected ({rows}, K)")
    checks.same_shape("teacher_topk_logp_NK", logp, "topk_ids_NK", ids)
    checks.per_entry("topk_ids_NK", ids, device, "ids")
    checks.per_entry("teacher_topk_logp_NK", logp, device, "float")


def _check_numbers(
    top_k: int, temperature: float, high: float, low: float, mask_high: float, clip: float | None
) -> None:
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}, expected at least 1")
    checks.positive("temperature", temperature)
    checks.positive("ratio_clip_high", high)
    if not 0 <= low <= mask_high:
        raise ValueError(f"token_mask_low: {low}, expected within [0, token_mask_high={mask_high}]")
    if clip is not None:
        checks.positive("kl_clip", clip)
