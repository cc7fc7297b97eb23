"""A one-sample estimate of the reverse KL, from the teacher's log-prob of the sampled token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minidistill.estimators.base import Estimator, LossSettings, TeacherInputs, TeacherNeeds
from minidistill.types import Completion, TeacherScores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minidistill_kernels import DistillOutput


class Sampled(Estimator):
    """-ρ [adv_tau A + teacher_tau log q(y) - student_tau log π(y)] log π(y), the bracket detached.

    The policy-gradient form of the reverse KL: Lu et al., "On-Policy Distillation", 2025.
    """

    name = kernel_mode = "sampled"
    needs = TeacherNeeds.SAMPLED_LOGPROBS
    default_kl_clip: float | None = 5.0

    def engine_scores(
        self,
        scores: Sequence[TeacherScores],
        completions: Sequence[Completion],
        device: torch.device,
    ) -> TeacherInputs:
        import torch

        logprobs = [p for s in scores for p in s.logprobs]
        return {"teacher_logp_N": torch.tensor(logprobs, device=device)}

    def split(
        self, output: DistillOutput, advantage_N: Tensor, settings: LossSettings
    ) -> tuple[float, float]:
        """`loss/policy` is the whole loss; `loss/kl` is the estimate of the divergence."""
        terms_N = settings.teacher_tau * output.teacher_logp - settings.student_tau * output.logp
        return float(output.loss.mean()), float(-terms_N.mean())


SAMPLED = Sampled()
