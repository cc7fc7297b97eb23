"""The objective per token: from row statistics to losses and coefficients of the logit gradient.

Both backends share it. Every gradient here has the form

    dL/dz_v = pi_v (base + scale (b_v - E b)) + target [v = y] + sparse corrections,

    b_v = student_tau z_v - teacher_tau z^q_v,

with coefficients per token. y is the sampled token, z = s / temperature are the student's scaled
logits and z^q the teacher's. The gradient of

    the full divergence D = sum_v pi_v (student_tau log pi_v - teacher_tau log q_v) is
        pi_v (b_v - E b), because the partition functions cancel;
    log pi(y) is [v = y] - pi_v;
    the top-k divergence D, where each of the k ids and the rest is a bucket B with
        c_B = student_tau log pi_B - teacher_tau log q_B, is pi_v (c_B(v) - D).

Legend: _C tokens of a chunk, _K ids per token. Vectors of tokens, (C,), have no suffix in
`token_terms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill_kernels.stats import RowStats

# A smaller mass of the rest is the rounding error of an fp32 sum near 1.
REST_FLOOR = 1.2e-7


@dataclass(frozen=True, slots=True)
class Objective:
    """What loss to compute; `mode` is 'logprob', 'full', 'sampled' or 'top_k'."""

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
        """(m, n) such that b = m delta + n z, with delta = z - z^q."""
        return self.teacher_tau, self.student_tau - self.teacher_tau


class TokenData(NamedTuple):
    """The inputs of each token besides its logits; absent ones are None."""

    ids: Tensor
    advantage: Tensor | None = None
    sampler_logp: Tensor | None = None
    teacher_logp: Tensor | None = None
    topk_teacher_logp: Tensor | None = None

    def take(self, rows: Tensor | slice) -> TokenData:
        ids, *floats = self
        return TokenData(ids[rows], *(None if x is None else x[rows].float() for x in floats))


class Picked(NamedTuple):
    """The columns of the top-k estimator, gathered before the logits are overwritten."""

    ids: Tensor  # (C, K)
    s: Tensor  # (C, K) the student's logits
    delta: Tensor | None  # (C, K) the student's logits minus the teacher's
    whole: bool  # K is the vocabulary, so there is no rest


class Gradient(NamedTuple):
    """Coefficients of the gradient with respect to z; None stands for 0."""

    base: Tensor  # (C,)
    scale: Tensor | None = None  # (C,)
    target: Tensor | None = None  # (C,)
    sparse: Tensor | None = None  # (C, K), added at the columns Picked.ids

    def times(self, factor: float) -> Gradient:
        if factor == 1.0:
            return self
        scale, target, sparse = (None if g is None else g * factor for g in self[1:])
        return Gradient(self.base * factor, scale, target, sparse)


class DistillOutput(NamedTuple):
    """Results per token, each (N,) and fp32 unless noted. Only `loss` is differentiable.

    Rows that are padding or not valid are 0 (False).
    """

    loss: Tensor
    """The loss of the token, not reduced."""
    logp: Tensor
    """log pi(y)"""
    teacher_logp: Tensor
    """log q(y). With `teacher_topk_logp_NK` and no `teacher_logp_N`: log q(y) if y is among the k
    ids, else the log of the rest's mass, an upper bound."""
    kl: Tensor
    """KL(pi || q), nats: exact with `h_t_NH`; over k ids and the rest with `teacher_topk_logp_NK`;
    the one-sample estimate log pi(y) - log q(y) with `teacher_logp_N`."""
    entropy: Tensor
    """Entropy of the student, nats."""
    teacher_entropy: Tensor | None
    """Entropy of the teacher, nats; None without `h_t_NH`."""
    ratio: Tensor
    """pi(y) / mu(y), not truncated; 1 without `sampler_logp_N`."""
    masked: Tensor
    """bool: `ratio` is outside [token_mask_low, token_mask_high]; the token's loss is 0."""
    ratio_clipped: Tensor
    """bool: `ratio` is above `ratio_clip_high`."""
    kl_clipped: Tensor
    """bool: the distillation term was bounded by `kl_clip`."""


class Terms(NamedTuple):
    """The outputs per token, (C,) fp32, flags as 0 or 1. Their meaning: see `DistillOutput`."""

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
    """Losses and metrics of a chunk, and the coefficients of its logit gradient."""
    zero = torch.zeros_like(row.logp)
    if obj.mode == "logprob":
        terms = Terms(*[zero] * len(Terms._fields))._replace(
            loss=row.logp, logp=row.logp, entropy=row.entropy
        )
        return terms, Gradient(base=zero - 1.0, target=zero + 1.0)

    ratio, rho, masked, ratio_clipped = _importance_ratio(obj, row.logp, data.sampler_logp)
    teacher_logp = row.q_logp if has_teacher else data.teacher_logp
    kl = row.kl.clamp(min=0.0)
    # the loss has the term -rho * coefficient * log pi(y)
    coefficient = zero if data.advantage is None else obj.adv_tau * data.advantage
    scale = sparse = None
    base = divergence = kl_clipped = zero

    if obj.mode == "sampled":
        assert teacher_logp is not None
        distillation = obj.teacher_tau * teacher_logp - obj.student_tau * row.logp
        if obj.kl_clip is not None:
            kl_clipped = (distillation.abs() > obj.kl_clip).float()
            distillation = distillation.clamp(-obj.kl_clip, obj.kl_clip)
        coefficient = coefficient + distillation
        if not has_teacher:
            kl = row.logp - teacher_logp
    elif obj.mode == "full":
        # sum pi (s log pi - t log q) = t KL - (s - t) entropy
        divergence = obj.teacher_tau * row.kl - obj.mix[1] * row.entropy
        factor, kl_clipped = _clip_factor(obj, divergence)
        divergence, scale = divergence * factor, factor
    else:
        assert picked is not None
        divergence, topk_kl, base, sparse = _top_k(obj, row, data, picked)
        factor, kl_clipped = _clip_factor(obj, divergence)
        divergence, base = divergence * factor, base * factor
        sparse = sparse * factor[:, None]
        if not has_teacher:
            kl = topk_kl
            teacher_logp = _top_k_teacher_logp(data, picked)

    assert teacher_logp is not None
    target = -rho * coefficient
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


def _importance_ratio(
    obj: Objective, logp: Tensor, sampler_logp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pi(y) / mu(y), the same truncated, whether it is masked (NaN is), and whether truncated."""
    if sampler_logp is None:
        one = torch.ones_like(logp)
        false = torch.zeros_like(logp, dtype=torch.bool)
        return one, one, false, false
    ratio = torch.exp(logp - sampler_logp)
    masked = ~((ratio >= obj.token_mask_low) & (ratio <= obj.token_mask_high))
    return ratio, ratio.clamp(max=obj.ratio_clip_high), masked, ratio > obj.ratio_clip_high


def _clip_factor(obj: Objective, divergence: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that scales a divergence down to `kl_clip`, and whether it is below 1."""
    if obj.kl_clip is None:
        return torch.ones_like(divergence), torch.zeros_like(divergence)
    over = divergence > obj.kl_clip
    return torch.where(over, obj.kl_clip / divergence, 1.0), over.float()


def _top_k(
    obj: Objective, row: RowStats, data: TokenData, picked: Picked
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence and KL over k ids and the rest, and the gradient's `base` and `sparse`.

    In float64, because the rest is a difference of sums near 1, and C x K is small.
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
    # where pi is 0 the term is 0, even if log q is -inf
    positive = p_CK > 0
    kl_C = torch.where(positive, p_CK * gap_CK, 0.0).sum(1) + rest_C * rest_gap_C
    div_C = torch.where(positive, p_CK * cost_CK, 0.0).sum(1) + rest_C * rest_cost_C
    sparse_CK = torch.where(positive, p_CK * (cost_CK - rest_cost_C[:, None]), 0.0)
    return div_C.float(), kl_C.float(), (rest_cost_C - div_C).float(), sparse_CK.float()


def _top_k_teacher_logp(data: TokenData, picked: Picked) -> Tensor:
    """log q(y) from the scores of k ids; the log of the rest's mass if y is not among them."""
    if data.teacher_logp is not None:
        return data.teacher_logp
    assert data.topk_teacher_logp is not None
    logq_CK = data.topk_teacher_logp.double()
    hit_CK = picked.ids == data.ids[:, None]
    rest_C = (1.0 - logq_CK.exp().sum(1)).clamp(min=REST_FLOOR).log()
    at_y_C = torch.where(hit_CK, logq_CK, 0.0).sum(1)
    return torch.where(hit_CK.any(1), at_y_C, rest_C).float()
