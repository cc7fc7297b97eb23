"""Which power of the teacher the student has become.

The objective teacher_tau log q - student_tau log π is largest at π ∝ q^r, r = teacher_tau /
student_tau. Here r is measured, from the two distributions at each token.

Shapes: `_N` tokens, `_V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LARGEST = 64.0
"""A student that is sharper than this power of the teacher is taken for this."""
BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Power:
    """The exponent r with the smallest mean KL(π‖q^r / Z), and that KL in nats."""

    exponent: float
    kl: float


def fit(student_NV: Tensor, teacher_NV: Tensor) -> Power:
    """From log-probs. The mean KL is convex in r: its derivative, the mean of E_{q^r} log q less
    that of E_π log q, has one zero."""
    student_NV, teacher_NV = student_NV.double(), teacher_NV.double()
    wanted = float((student_NV.exp() * teacher_NV).sum(-1).mean())
    low, high = 0.0, LARGEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        powered_NV = (middle * teacher_NV).log_softmax(-1)
        if float((powered_NV.exp() * teacher_NV).sum(-1).mean()) < wanted:
            low = middle
        else:
            high = middle
    exponent = (low + high) / 2
    return Power(exponent, mean_kl(student_NV, teacher_NV, exponent))


def mean_kl(student_NV: Tensor, teacher_NV: Tensor, exponent: float) -> float:
    """Mean KL(π‖q^r / Z), nats."""
    student_NV = student_NV.double()
    powered_NV = (exponent * teacher_NV.double()).log_softmax(-1)
    return float((student_NV.exp() * (student_NV - powered_NV)).sum(-1).mean())


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Of each token, (N,) nats."""
    logprobs_NV = logprobs_NV.double()
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)
