"""The training objective per token: from row statistics to losses and logit-gradient coefficients.

Shared by both backends. Every gradient here has the form

    dL/dz_v = pi_v (base + scale (b_v - E b)) + target [v = y] + sparse corrections,

    b_v = student_tau z_v - teacher_tau z^q_v,

with coefficients per token. For the full divergence D = sum_v pi_v (student_tau log pi_v -
teacher_tau log q_v) that is pi_v (b_v - E b), since the partition functions drop out; for
log pi(y) it is [v = y] - pi_v; for the top-k sum, with a bucket B and c_B = student_tau log pi_B -
teacher_tau log q_B, it is pi_v (c_B(v) - D).

Legend: _C tokens of a chunk, _K ids a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill_kernels.stats import RowStats

# Mass below which the bucket of the rest is rounding noise of an fp32 sum near 1.
REST_FLOOR = 1.2e-7


@dataclass(frozen=True, slots=True)
class Objective:
    """How statistics become a loss; `mode` is 'logprob', 'full', 'sampled' or 'top_k'."""

    mode: str
    top_k: int = 64
    adv_tau: float = 0.0
    teacher_tau: float = 1.0
    student_tau: float = 1.0
    temperature: float = 1.0
    ratio_clip_high: float = 2.0
    token_mask_low: float = 0.0
    token_mask_high: float = float("inf")
    kl_clip: float | None = None

    @property
    def mix(self) -> tuple[float, float]:
        """b in terms of delta = z - z^q and z."""
        return self.teacher_tau, self.student_tau - self.teacher_tau


class TokenData(NamedTuple):
    """What is known of each token besides the logits; absent entries are None."""

    ids: Tensor
    advantage: Tensor | None = None
    sampler_logp: Tensor | None = None
    teacher_logp: Tensor | None = None
    topk_teacher_logp: Tensor | None = None

    def take(self, rows: Tensor | slice) -> TokenData:
        ids, *floats = self
        return TokenData(ids[rows], *(None if x is None else x[rows].float() for x in floats))


class Picked(NamedTuple):
    """The student's top-k columns, gathered before the logits are overwritten."""

    ids: Tensor  # (C, K)
    s: Tensor  # (C, K) student's logits
    delta: Tensor | None  # (C, K) student's - teacher's logits
    whole: bool  # K is the vocabulary: there is no rest


class Gradient(NamedTuple):
    """Coefficients of the logit gradient with respect to z; None stands for 0."""

    base: Tensor  # (C,)
    scale: Tensor | None = None  # (C,)
    target: Tensor | None = None  # (C,)
    sparse: Tensor | None = None  # (C, K), added at Picked.ids

    def times(self, factor: float) -> Gradient:
        if factor == 1.0:
            return self
        scale, target, sparse = (None if g is None else g * factor for g in self[1:])
        return Gradient(self.base * factor, scale, target, sparse)


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


class Terms(NamedTuple):
    """The outputs for each token, (C,) fp32; flags are 0 or 1."""

    loss: Tensor
    logp: Tensor
    teacher_logp: Tensor
    kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    ratio: Tensor
    masked: Tensor
    ratio_clipped: Tensor
    kl_clipped: Tensor


def token_terms(
    obj: Objective, row: RowStats, data: TokenData, picked: Picked | None, has_teacher: bool
) -> tuple[Terms, Gradient]:
    """Losses, metrics and gradient coefficients of a chunk."""
    zero = torch.zeros_like(row.logp)
    if obj.mode == "logprob":
        terms = Terms(*[zero] * len(Terms._fields))._replace(
            loss=row.logp, logp=row.logp, entropy=row.entropy
        )
        return terms, Gradient(base=zero - 1.0, target=zero + 1.0)

    ratio, weight, masked, ratio_clipped = _ratio(obj, row.logp, data.sampler_logp)
    teacher_logp = row.q_logp if has_teacher else data.teacher_logp
    kl = row.kl.clamp(min=0.0)
    coupling = zero if data.advantage is None else obj.adv_tau * data.advantage
    scale = sparse = None
    base = divergence = kl_clipped = zero

    if obj.mode == "sampled":
        assert teacher_logp is not None
        pull = obj.teacher_tau * teacher_logp - obj.student_tau * row.logp
        if obj.kl_clip is not None:
            kl_clipped = (pull.abs() > obj.kl_clip).float()
            pull = pull.clamp(-obj.kl_clip, obj.kl_clip)
        coupling = coupling + pull
        if not has_teacher:
            kl = row.logp - teacher_logp
    elif obj.mode == "full":
        # sum pi (s log pi - t log q) = t KL - (s - t) entropy
        divergence = obj.teacher_tau * row.kl - obj.mix[1] * row.entropy
        bound, kl_clipped = _bound(obj, divergence)
        divergence, scale = divergence * bound, bound
    else:
        assert picked is not None
        divergence, topk_kl, rest, sparse = _top_k(obj, row, data, picked)
        bound, kl_clipped = _bound(obj, divergence)
        divergence, base = divergence * bound, rest * bound
        sparse = sparse * bound[:, None]
        if not has_teacher:
            kl = topk_kl
            teacher_logp = _teacher_logp(data, picked)

    assert teacher_logp is not None
    target = -weight * coupling
    keep = ~masked
    loss = torch.where(keep, target * row.logp + divergence, 0.0)
    gradient = Gradient(
        base=torch.where(keep, base - target, 0.0),
        scale=None if scale is None else torch.where(keep, scale, 0.0),
        target=torch.where(keep, target, 0.0),
        sparse=None if sparse is None else torch.where(keep[:, None], sparse, 0.0),
    )
    q_entropy = row.q_entropy if has_teacher else zero
    flags = (masked.float(), ratio_clipped.float(), kl_clipped)
    return Terms(loss, row.logp, teacher_logp, kl, row.entropy, q_entropy, ratio, *flags), gradient


def _ratio(
    obj: Objective, logp: Tensor, sampler_logp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rho, rho truncated from above, outside the mask's range (NaN is outside), truncated."""
    if sampler_logp is None:
        one = torch.ones_like(logp)
        off = torch.zeros_like(logp, dtype=torch.bool)
        return one, one, off, off
    ratio = torch.exp(logp - sampler_logp)
    masked = ~((ratio >= obj.token_mask_low) & (ratio <= obj.token_mask_high))
    return ratio, ratio.clamp(max=obj.ratio_clip_high), masked, ratio > obj.ratio_clip_high


def _bound(obj: Objective, divergence: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that brings a divergence down to the clip, and where it is below 1."""
    if obj.kl_clip is None:
        return torch.ones_like(divergence), torch.zeros_like(divergence)
    over = divergence > obj.kl_clip
    return torch.where(over, obj.kl_clip / divergence, 1.0), over.float()


def _top_k(
    obj: Objective, row: RowStats, data: TokenData, picked: Picked
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence and KL over k ids and the rest; gradient factor of the rest; its corrections.

    In float64: C x K is little, and the rest is a difference of sums near 1.
    """
    logp_CK = (picked.s - row.top[:, None]).double() / obj.temperature - row.log_sum[:, None]
    if picked.delta is not None:
        gap_CK = (picked.delta - row.d_mean[:, None]).double() / obj.temperature + row.kl[:, None]
    else:
        assert data.topk_teacher_logp is not None
        gap_CK = logp_CK - data.topk_teacher_logp
    p_CK = logp_CK.exp()
    cost_CK = obj.teacher_tau * gap_CK + obj.mix[1] * logp_CK
    if picked.whole:
        rest_C = rest_gap_C = rest_cost_C = torch.zeros_like(p_CK[:, 0])
    else:
        rest_C = (1.0 - p_CK.sum(1)).clamp(min=REST_FLOOR)
        q_rest_C = (1.0 - (logp_CK - gap_CK).exp().sum(1)).clamp(min=REST_FLOOR)
        rest_gap_C = rest_C.log() - q_rest_C.log()
        rest_cost_C = obj.teacher_tau * rest_gap_C + obj.mix[1] * rest_C.log()
    # Where pi is 0 the term is 0, though the teacher may give -inf.
    some = p_CK > 0
    kl_C = torch.where(some, p_CK * gap_CK, 0.0).sum(1) + rest_C * rest_gap_C
    div_C = torch.where(some, p_CK * cost_CK, 0.0).sum(1) + rest_C * rest_cost_C
    sparse_CK = torch.where(some, p_CK * (cost_CK - rest_cost_C[:, None]), 0.0)
    return div_C.float(), kl_C.float(), (rest_cost_C - div_C).float(), sparse_CK.float()


def _teacher_logp(data: TokenData, picked: Picked) -> Tensor:
    """log q(y) from an engine's top k; its upper bound, the rest's mass, where y is not in it."""
    if data.teacher_logp is not None:
        return data.teacher_logp
    assert data.topk_teacher_logp is not None
    logq_CK = data.topk_teacher_logp.double()
    hit_CK = picked.ids == data.ids[:, None]
    rest_C = (1.0 - logq_CK.exp().sum(1)).clamp(min=REST_FLOOR).log()
    at_y_C = torch.where(hit_CK, logq_CK, 0.0).sum(1)
    return torch.where(hit_CK.any(1), at_y_C, rest_C).float()
