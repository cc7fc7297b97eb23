"""What one pass over a row of logits gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Per-row statistics, each (C,) fp32: student's logits s, teacher's t, delta = s - t.

    Means are under the student's pi. Maxima and E[delta] are of the logits as they came, since
    dividing by T before subtracting would round large logits once more.
    """

    top: Tensor
    """max s"""
    log_sum: Tensor
    """log sum exp((s - top) / T)"""
    z_mean: Tensor
    """E[(s - top) / T]"""
    logp: Tensor
    """log pi at the id"""
    entropy: Tensor
    """entropy of pi"""
    d_mean: Tensor
    """E[delta]"""
    kl: Tensor
    """KL(pi || q), not clamped at 0"""
    q_logp: Tensor
    """log q at the id"""
    q_entropy: Tensor
    """entropy of q"""
