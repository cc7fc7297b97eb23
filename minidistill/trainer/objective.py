"""The objective's settings, and its per-token figures by rollout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator, LossSettings
from minidistill_kernels import DistillOutput

Figures = dict[int, list[Tensor]]
"""By rollout, each a list of tensors in the order of `DistillOutput`."""


def loss_settings(config: Config, estimator: Estimator) -> LossSettings:
    """The configured numbers of the objective, `auto` resolved."""
    loss = config.trainer.loss
    if loss.kl_clip == "auto":
        kl_clip = estimator.default_kl_clip
    else:
        kl_clip = None if loss.kl_clip == "off" else loss.kl_clip
    return LossSettings(
        adv_tau=loss.adv_tau,
        teacher_tau=loss.teacher_tau,
        student_tau=loss.student_tau,
        temperature=config.orchestrator.sampling.temperature,
        top_k=loss.top_k,
        ratio_clip_high=loss.ratio_clip_high,
        token_mask_low=loss.token_mask_low,
        token_mask_high=loss.token_mask_high,
        kl_clip=kl_clip,
    )


def per_rollout(output: DistillOutput, sizes: list[int]) -> list[list[Tensor]]:
    """A micro-batch's figures by rollout, each a list in the order of `DistillOutput`."""
    # an engine tells no entropy
    columns = [torch.full_like(output.logp, math.nan) if t is None else t.detach() for t in output]
    return [list(parts) for parts in zip(*(t.cpu().split(sizes) for t in columns), strict=True)]
