"""The cross-entropy on the teacher's samples: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minidistill.estimators.base import LossSettings
from minidistill.estimators.sampled import Sampled

if TYPE_CHECKING:
    from torch import Tensor

    from minidistill_kernels import DistillOutput


class Sft(Sampled):
    """-teacher_tau log π(y), for samples y of the teacher.

    Its mean over samples is the forward KL, KL(q‖π), up to the teacher's entropy. There is no
    reward, no entropy term and no importance ratio. The teacher's log-probs are for the metrics.
    """

    name = "sft"
    default_kl_clip = None
    imitates = True

    def loss_function(self, settings: LossSettings) -> Callable[..., DistillOutput]:
        import torch

        # the kernel's reward term, with the same advantage for every token
        as_reward = replace(
            settings, adv_tau=settings.teacher_tau, teacher_tau=0.0, student_tau=0.0
        )
        distill = super().loss_function(as_reward)

        def loss(
            *student: Any, advantage_N: Tensor, sampler_logp_N: Tensor, **teacher: Any
        ) -> DistillOutput:
            return distill(*student, advantage_N=torch.ones_like(advantage_N), **teacher)

        return loss

    def split(
        self, output: DistillOutput, advantage_N: Tensor, settings: LossSettings
    ) -> tuple[float, float]:
        """`loss/kl` is the whole loss."""
        return 0.0, float(output.loss.detach().mean())


SFT = Sft()
