"""Fused log-prob, entropy and reverse-KL kernels, in Triton for CUDA and in torch for the CPU.

Importing this package imports neither triton nor minidistill.
"""

from minidistill_kernels.distill import linear_distill
from minidistill_kernels.head import Head
from minidistill_kernels.linear import linear_logprob, linear_reverse_kl
from minidistill_kernels.objective import DistillOutput
from minidistill_kernels.rows import reverse_kl, selective_logprob

__all__ = [
    "DistillOutput",
    "Head",
    "linear_distill",
    "linear_logprob",
    "linear_reverse_kl",
    "reverse_kl",
    "selective_logprob",
]
