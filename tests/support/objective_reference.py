"""The objective on logits in plain torch, for any dtype: the reference for the fused one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    loss: Tensor
    kl: Tensor
    logp: Tensor
    teacher_logp: Tensor
    ratio: Tensor
    masked: Tensor


def objective(
    student_NV: Tensor,
    teacher_NV: Tensor,
    ids_N: Tensor,
    *,
    estimator: str,
    advantage_N: Tensor | None = None,
    sampler_logp_N: Tensor | None = None,
    adv_tau: float = 0.5,
    teacher_tau: float = 0.5,
    student_tau: float = 0.5,
    temperature: float = 1.0,
    top_k: int = 64,
    ratio_clip_high: float = 2.0,
    token_mask_low: float = 0.125,
    token_mask_high: float = 8.0,
    kl_clip: float | None = None,
) -> Objective:
    """Loss and metrics of each token. Only `student_NV` gets a gradient, from autograd."""
    s = torch.log_softmax(student_NV / temperature, dim=-1)
    t = torch.log_softmax(teacher_NV / temperature, dim=-1).detach()
    ids_N1 = ids_N[:, None]
    logp, teacher_logp = s.gather(1, ids_N1)[:, 0], t.gather(1, ids_N1)[:, 0]
    advantage = torch.zeros_like(logp) if advantage_N is None else advantage_N
    sampler = logp.detach() if sampler_logp_N is None else sampler_logp_N
    ratio = (logp.detach() - sampler).exp()
    masked = (ratio < token_mask_low) | (ratio > token_mask_high)
    rho = ratio.clamp(max=ratio_clip_high)
    if estimator == "sampled":
        term = (teacher_tau * teacher_logp - student_tau * logp).detach()
        if kl_clip is not None:
            term = term.clamp(-kl_clip, kl_clip)
        loss = -rho * (adv_tau * advantage + term) * logp
    else:
        if estimator == "top_k":
            top = s.detach().topk(top_k, dim=-1).indices
            s, t = _with_rest(s, top), _with_rest(t, top)
        divergence = (s.exp() * (student_tau * s - teacher_tau * t)).sum(-1)
        if kl_clip is not None:
            divergence = divergence * (kl_clip / divergence.detach()).clamp(max=1.0).where(
                divergence.detach() > kl_clip, 1.0
            )
        loss = -rho * adv_tau * advantage * logp + divergence
    full_s = torch.log_softmax(student_NV / temperature, -1)
    full_t = torch.log_softmax(teacher_NV / temperature, -1)
    kl = (full_s.exp() * (full_s - full_t)).sum(-1).detach()
    loss = loss.masked_fill(masked, 0.0)
    return Objective(loss, kl, logp.detach(), teacher_logp, ratio, masked)


def _with_rest(logp_NV: Tensor, top_NK: Tensor) -> Tensor:
    """Log-probs of the K chosen ids, and of all other ids together, (N, K + 1)."""
    rest = torch.ones_like(logp_NV, dtype=torch.bool).scatter(1, top_NK, False)
    others = logp_NV.masked_fill(~rest, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logp_NV.gather(1, top_NK), others], dim=1)
