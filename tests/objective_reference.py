"""Temporary plain torch objective."""
from __future__ import annotations
from typing import NamedTuple
import torch
from torch import Tensor

class DistillOutput(NamedTuple):
    loss: Tensor
    logp: Tensor
    teacher_logp: Tensor
    kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor | None
    ratio: Tensor
    masked: Tensor
    ratio_clipped: Tensor
    kl_clipped: Tensor

def linear_distill(h_s_NH, weight_VH, ids_N, *, h_t_NH=None, advantage_N=None, sampler_logp_N=None,
    estimator="full", top_k=64, adv_tau=0.5, teacher_tau=0.5, student_tau=0.5, temperature=1.0,
    ratio_clip_high=2.0, token_mask_low=0.125, token_mask_high=8.0, kl_clip=None):
    w = weight_VH.detach()
    ls = torch.log_softmax((h_s_NH @ w.T).float() / temperature, -1)
    lt = torch.log_softmax((h_t_NH @ w.T).float() / temperature, -1)
    p = ls.exp()
    logp = ls.gather(1, ids_N[:, None])[:, 0]
    tlogp = lt.gather(1, ids_N[:, None])[:, 0]
    kl = (p * (ls - lt)).sum(-1)
    ent = -(p * ls).sum(-1)
    tent = -(lt.exp() * lt).sum(-1)
    A = torch.zeros_like(logp) if advantage_N is None else advantage_N
    ratio = torch.ones_like(logp) if sampler_logp_N is None else (logp.detach() - sampler_logp_N).exp()
    masked = (ratio < token_mask_low) | (ratio > token_mask_high)
    clipped = ratio > ratio_clip_high
    rho = ratio.clamp(max=ratio_clip_high)
    none = torch.zeros_like(masked)
    if estimator == "sampled":
        term = (teacher_tau * tlogp - student_tau * logp).detach()
        klc = none
        if kl_clip is not None:
            klc = term.abs() > kl_clip
            term = term.clamp(-kl_clip, kl_clip)
        loss = -rho * (adv_tau * A + term) * logp
    else:
        if estimator == "full":
            D = (p * (student_tau * ls - teacher_tau * lt)).sum(-1)
        else:
            top = ls.detach().topk(min(top_k, ls.shape[1]), -1).indices
            a, b = ls.gather(1, top), lt.gather(1, top)
            ra = torch.log1p(-a.exp().sum(-1).clamp(max=1 - 1e-7)); rb = torch.log1p(-b.exp().sum(-1).clamp(max=1 - 1e-7))
            D = (a.exp() * (student_tau * a - teacher_tau * b)).sum(-1) + ra.exp() * (student_tau * ra - teacher_tau * rb)
        klc = none
        if kl_clip is not None:
            klc = D.detach() > kl_clip
            D = D * torch.where(klc, kl_clip / D.detach(), 1.0)
        loss = -rho * adv_tau * A * logp + D
    loss = torch.where(masked, 0.0, loss)
    d = [t.detach() for t in (logp, tlogp, kl, ent, tent)]
    return DistillOutput(loss, *d, ratio.detach(), masked, clipped, klc)
