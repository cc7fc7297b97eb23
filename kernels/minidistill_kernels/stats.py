"""The statistics of one pass over a row of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of each row, (C,) fp32: student's logits s, teacher's t, delta = s - t.

    Means are under the student's pi at temperature T. `top` and `d_mean` are of the logits before
    the division by T, which would round large logits once more before the subtraction.
    """

    top: Tensor
    """max s"""
    log_sum: Tensor
    """log sum exp((s - top) / T)"""
    z_mean: Tensor
    """E[(s - top) / T]"""
    logp: Tensor
    """log pi at the id, nats"""
    entropy: Tensor
    """entropy of pi, nats"""
    d_mean: Tensor
    """E[delta]"""
    kl: Tensor
    """KL(pi || q), nats, not clamped at 0"""
    q_logp: Tensor
    """log q at the id, nats"""
    q_entropy: Tensor
    """entropy of q, nats"""
