"""Reference implementations in float64: the definitions, on any device, with autograd.

They need (N, V) memory. Legend: _N tokens, _H hidden, _V vocabulary, _K ids per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels.head import Head


def logits(hidden_NH: Tensor, head: Tensor | Head) -> Tensor:
    """(N, V) float64: scale (h Wᵀ + bias), or c tanh of it / c."""
    head = Head.of(head)
    logits_NV = hidden_NH.double() @ head.weight_VH.double().t()
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    return logits_NV if head.cap is None else head.cap * torch.tanh(logits_NV / head.cap)


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(logits_NV.double() / temperature, dim=1)


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """sum_v p x, where 0 * inf is 0 in value and gradient."""
    return torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0).sum(1)


def selective_logprob(
    logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (N,) float64, nats; rows with id -100 are 0."""
    logp_NV = log_softmax(logits_NV, temperature)
    pad_N = ids_N == -100
    at_N = logp_NV.gather(1, ids_N.masked_fill(pad_N, 0)[:, None].long())[:, 0]
    entropy_N = -_expect(logp_NV.exp(), logp_NV)
    return at_N.masked_fill(pad_N, 0.0), entropy_N.masked_fill(pad_N, 0.0)


def reverse_kl(
    s_NV: Tensor,
    t_NV: Tensor,
    temperature: float = 1.0,
    student_tau: float = 1.0,
    teacher_tau: float = 1.0,
) -> Tensor:
    """sum_v pi_v (student_tau log pi_v - teacher_tau log q_v), (N,) float64, nats."""
    logp_NV, logq_NV = log_softmax(s_NV, temperature), log_softmax(t_NV, temperature)
    return _expect(logp_NV.exp(), student_tau * logp_NV - teacher_tau * logq_NV)


def linear_distill(
    h_s_NH: Tensor,
    weight_VH: Tensor | Head,
    ids_N: Tensor,
    *,
    h_t_NH: Tensor | None = None,
    teacher_weight: Tensor | Head | None = None,
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
) -> dict[str, Any]:
    """Every output of `minidistill_kernels.linear_distill` by name, float64, for valid rows."""
    logp_NV = log_softmax(logits(h_s_NH, weight_VH), temperature)
    logp_N = logp_NV.gather(1, ids_N[:, None])[:, 0]
    entropy_N = -_expect(logp_NV.exp(), logp_NV)
    logq_NV = kl_N = q_entropy_N = None
    if h_t_NH is not None:
        q_weight = weight_VH if teacher_weight is None else teacher_weight
        logq_NV = log_softmax(logits(h_t_NH, q_weight), temperature).detach()
        teacher_logp_N = logq_NV.gather(1, ids_N[:, None])[:, 0]
        kl_N = _expect(logp_NV.exp(), logp_NV - logq_NV)
        q_entropy_N = -_expect(logq_NV.exp(), logq_NV)

    ratio_N = torch.ones_like(logp_N)
    if sampler_logp_N is not None:
        ratio_N = torch.exp(logp_N - sampler_logp_N.double()).detach()
    rho_N = ratio_N.clamp(max=ratio_clip_high)
    masked_N = (ratio_N < token_mask_low) | (ratio_N > token_mask_high)
    coefficient_N = torch.zeros_like(logp_N)
    if advantage_N is not None:
        coefficient_N = adv_tau * advantage_N.double()
    divergence_N = torch.zeros_like(logp_N)
    clipped_N = torch.zeros_like(masked_N)

    if estimator == "sampled":
        assert teacher_logp_N is not None
        distillation_N = (teacher_tau * teacher_logp_N - student_tau * logp_N).detach()
        if kl_clip is not None:
            clipped_N = distillation_N.abs() > kl_clip
            distillation_N = distillation_N.clamp(-kl_clip, kl_clip)
        coefficient_N = coefficient_N + distillation_N
        kl_N = logp_N - teacher_logp_N if kl_N is None else kl_N
    else:
        p_logp, p_logq = logp_NV, logq_NV
        if estimator == "top_k":
            if topk_ids_NK is None:
                topk_ids_NK = logp_NV.topk(min(top_k, logp_NV.shape[1])).indices
            p_logp = _buckets(logp_NV, topk_ids_NK)
            if logq_NV is not None:
                p_logq = _buckets(logq_NV, topk_ids_NK)
            else:
                assert teacher_topk_logp_NK is not None
                known_NK = teacher_topk_logp_NK.double()
                rest_N = torch.log1p(-known_NK.exp().sum(1))
                p_logq = torch.cat([known_NK, rest_N[:, None]], 1)
        assert p_logq is not None
        divergence_N = _expect(p_logp.exp(), student_tau * p_logp - teacher_tau * p_logq)
        if kl_N is None:
            kl_N = _expect(p_logp.exp(), p_logp - p_logq)
        if kl_clip is not None:
            clipped_N = divergence_N > kl_clip
            factor_N = torch.where(clipped_N, kl_clip / divergence_N, 1.0).detach()
            divergence_N = divergence_N * factor_N
    loss_N = -rho_N * coefficient_N * logp_N + divergence_N
    assert kl_N is not None
    return {
        "loss": torch.where(masked_N, 0.0, loss_N),
        "logp": logp_N.detach(),
        "teacher_logp": teacher_logp_N,
        "kl": kl_N.detach(),
        "entropy": entropy_N.detach(),
        "teacher_entropy": q_entropy_N,
        "ratio": ratio_N,
        "masked": masked_N,
        "ratio_clipped": ratio_N > ratio_clip_high,
        "kl_clipped": clipped_N,
    }


def _buckets(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probs of the ids and, last, of all the rest together: (N, K + 1), or (N, K) if K = V."""
    top_NK = logp_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == logp_NV.shape[1]:
        return top_NK
    rest_NV = logp_NV.scatter(1, ids_NK, float("-inf"))
    return torch.cat([top_NK, torch.logsumexp(rest_NV, 1, keepdim=True)], 1)
