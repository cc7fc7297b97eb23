"""The row kernels in torch: softmax statistics and logit gradients of a chunk, mostly in place.

The same functions as in `triton_rows`: `stats` and `dlogits`. Here `stats` overwrites its inputs,
and `dlogits` continues from the result (s: exp(z - max z), x: the centered b).

Legend: _C tokens of a chunk, _V vocabulary, _B tokens of a block; s: student's logits, z = s / T,
e: exp(z - max z); x: delta = s - t, or the teacher's logits t; tmp: a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill_kernels.stats import RowStats

# Elements per block, so that its few temporaries stay in the last-level cache.
BLOCK_ELEMENTS = 1 << 19
# In place of -inf: exp(-1e4) is 0 in fp32 too, and 0 * -1e4 is 0, but 0 * -inf is NaN.
FLOOR = -1.0e4


def _dot(a_BV: Tensor, b_BV: Tensor, scratch_BV: Tensor) -> Tensor:
    return torch.mul(a_BV, b_BV, out=scratch_BV).sum(1)


def _at(x_BV: Tensor, ids_B: Tensor) -> Tensor:
    return x_BV.gather(1, ids_B[:, None])[:, 0]


def stats(
    s_CV: Tensor,
    x_CV: Tensor | None,
    ids_C: Tensor,
    *,
    pair: bool = False,
    inv_temperature: float = 1.0,
    mix: tuple[float, float] = (1.0, 0.0),
    need_grad: bool = True,
) -> RowStats:
    """Statistics of each row, fp32. `s_CV` and `x_CV`, both fp32, are overwritten.

    Afterwards `s_CV` is exp(z - max z), where z = s / T. With `need_grad` and a teacher, `x_CV` is
    b - E[b] = mix[0] * (delta - E delta) + mix[1] * (z - E z), means under the student. Before, it
    is delta, or with `pair` the teacher's logits.
    """
    tokens, vocab = s_CV.shape
    out = torch.zeros(len(RowStats._fields), tokens, dtype=torch.float32, device=s_CV.device)
    block = max(1, min(tokens, BLOCK_ELEMENTS // vocab))
    buffers = s_CV.new_empty(2, block, vocab)
    for i in range(0, tokens, block):
        j = min(tokens, i + block)
        x_BV = None if x_CV is None else x_CV[i:j]
        e_BV, tmp_BV = buffers[0, : j - i], buffers[1, : j - i]
        _student(s_CV[i:j], ids_C[i:j], e_BV, tmp_BV, inv_temperature, out[:, i:j])
        if x_BV is not None:
            teacher = _teacher_pair if pair else _teacher_delta
            teacher(s_CV[i:j], x_BV, ids_C[i:j], e_BV, tmp_BV, inv_temperature, out[:, i:j])
            if need_grad:
                _mix(s_CV[i:j], x_BV, tmp_BV, mix, RowStats(*out[:, i:j]).z_mean)
        s_CV[i:j].copy_(e_BV)
    return RowStats(*out)


def _student(
    s_BV: Tensor, ids_B: Tensor, e_BV: Tensor, tmp_BV: Tensor, inv_t: float, out: Tensor
) -> None:
    row = RowStats(*out)
    top_B = s_BV.amax(1)
    s_BV.sub_(top_B[:, None])
    if inv_t != 1.0:
        s_BV.mul_(inv_t)
    torch.exp(s_BV, out=e_BV)
    sum_B = e_BV.sum(1)
    log_sum_B = sum_B.log()
    z_mean_B = _dot(e_BV, s_BV, tmp_BV) / sum_B
    row.top.copy_(top_B)
    row.log_sum.copy_(log_sum_B)
    row.z_mean.copy_(z_mean_B)
    row.logp.copy_(_at(s_BV, ids_B) - log_sum_B)
    row.entropy.copy_(log_sum_B - z_mean_B)


def _teacher_delta(
    s_BV: Tensor,
    x_BV: Tensor,
    ids_B: Tensor,
    e_BV: Tensor,
    tmp_BV: Tensor,
    inv_t: float,
    out: Tensor,
) -> None:
    """Teacher statistics from delta, which becomes centered.

    For a centered delta, KL = log E[exp(-delta)]. No large log-sum-exps are subtracted, so a KL of
    1e-4 stays accurate. The second mean corrects the rounding error of the first.
    """
    row = RowStats(*out)
    sum_B = e_BV.sum(1)
    d_mean_B = _dot(e_BV, x_BV, tmp_BV) / sum_B
    x_BV.sub_(d_mean_B[:, None])
    if inv_t != 1.0:
        x_BV.mul_(inv_t)
    rest_B = _dot(e_BV, x_BV, tmp_BV) / sum_B
    t_BV = torch.sub(s_BV, x_BV, out=tmp_BV)
    t_top_B = t_BV.amax(1)
    t_BV.sub_(t_top_B[:, None])
    t_y_B = _at(t_BV, ids_B)
    t_BV.exp_()
    t_sum_B = t_BV.sum(1)
    # E_q[t] as E_q[z - x] needs no third temporary
    t_mean_B = _weighted_difference(t_BV, s_BV, x_BV) / t_sum_B - t_top_B
    row.d_mean.copy_(d_mean_B + rest_B / inv_t)
    row.kl.copy_(rest_B + t_top_B + (t_sum_B / sum_B).log())
    row.q_logp.copy_(t_y_B - t_sum_B.log())
    row.q_entropy.copy_(t_sum_B.log() - t_mean_B)


def _weighted_difference(w_BV: Tensor, a_BV: Tensor, b_BV: Tensor) -> Tensor:
    """sum_v w_v (a_v - b_v); overwrites w."""
    plus_B = torch.linalg.vecdot(w_BV, a_BV)
    return plus_B - w_BV.mul_(b_BV).sum(1)


def _teacher_pair(
    s_BV: Tensor,
    t_BV: Tensor,
    ids_B: Tensor,
    e_BV: Tensor,
    tmp_BV: Tensor,
    inv_t: float,
    out: Tensor,
) -> None:
    """Teacher statistics from the teacher's own logits, which become the centered delta."""
    row = RowStats(*out)
    sum_B = e_BV.sum(1)
    t_top_B = t_BV.amax(1)
    t_BV.sub_(t_top_B[:, None])
    if inv_t != 1.0:
        t_BV.mul_(inv_t)
    t_y_B = _at(t_BV, ids_B)
    torch.exp(t_BV, out=tmp_BV)
    t_sum_B = tmp_BV.sum(1)
    t_mean_B = tmp_BV.mul_(t_BV.clamp(min=FLOOR)).sum(1) / t_sum_B
    torch.sub(s_BV, t_BV, out=t_BV)
    # where pi is 0 the term is 0, even if the teacher's logit is -inf as well
    t_BV.masked_fill_(e_BV == 0, 0.0)
    gap_B = _dot(e_BV, t_BV, tmp_BV) / sum_B
    t_BV.sub_(gap_B[:, None])
    row.d_mean.copy_(gap_B / inv_t + row.top - t_top_B)
    row.kl.copy_(gap_B + (t_sum_B / sum_B).log())
    row.q_logp.copy_(t_y_B - t_sum_B.log())
    row.q_entropy.copy_(t_sum_B.log() - t_mean_B)


def _mix(
    s_BV: Tensor, x_BV: Tensor, tmp_BV: Tensor, mix: tuple[float, float], z_mean_B: Tensor
) -> None:
    if mix[0] != 1.0:
        x_BV.mul_(mix[0])
    if mix[1] != 0.0:
        torch.sub(s_BV, z_mean_B[:, None], out=tmp_BV)
        x_BV.add_(tmp_BV, alpha=mix[1])


def dlogits(
    s_CV: Tensor,
    x_CV: Tensor | None,
    out_CV: Tensor,
    ids_C: Tensor,
    row: RowStats,
    *,
    base_C: Tensor,
    scale_C: Tensor | None,
    target_C: Tensor | None,
    pair: bool = False,
    inv_temperature: float = 1.0,
    mix: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """pi_v (base + scale (b_v - E b)) + target [v = id], in place of `s_CV`; None stands for 0.

    `x_CV` is the centered b that `stats` left there; without it, b is mix[1] * z.
    """
    assert out_CV is s_CV, "the torch kernel works in place"
    inv_sum_C = torch.exp(-row.log_sum)
    if x_CV is None and scale_C is not None:
        # z - max z again; if its exponential underflowed, pi is 0 and so is the term
        x_CV = s_CV.log().clamp_(min=-200.0).sub_(row.z_mean[:, None])
        x_CV.mul_(mix[1])
    if scale_C is None or x_CV is None:
        s_CV.mul_((base_C * inv_sum_C)[:, None])
    else:
        x_CV.mul_((scale_C * inv_sum_C)[:, None]).add_((base_C * inv_sum_C)[:, None])
        s_CV.mul_(x_CV)
    if target_C is not None:
        s_CV.scatter_add_(1, ids_C[:, None], target_C[:, None])
    return s_CV
