"""The objective's settings, and its per-token figures by rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator, LossSettings
from minidistill.types import TokenFigures
from minidistill_kernels import DistillOutput


def loss_settings(config: Config, estimator: Estimator, vocabulary: int) -> LossSettings:
    """The objective's settings with `auto` resolved. `vocabulary` is the head's number of rows.

    No token of a teacher's sample is masked: its ratio is no error of the sampler, and those with a
    low one teach the most.
    """
    loss = config.trainer.loss
    low, high = loss.token_mask_low, loss.token_mask_high
    if config.orchestrator.sample_from == "teacher":
        low, high = 0.0, math.inf
    if loss.kl_clip == "auto":
        kl_clip = estimator.default_kl_clip
    else:
        kl_clip = None if loss.kl_clip == "off" else loss.kl_clip
    return LossSettings(
        adv_tau=loss.adv_tau,
        teacher_tau=loss.teacher_tau,
        student_tau=loss.student_tau,
        temperature=config.orchestrator.sampling.temperature,
        top_k=min(loss.top_k, vocabulary),
        ratio_clip_high=loss.ratio_clip_high,
        token_mask_low=low,
        token_mask_high=high,
        kl_clip=kl_clip,
    )


def figures_by_rollout(output: DistillOutput, sizes: list[int]) -> list[TokenFigures]:
    """A micro-batch's figures by rollout. Rollouts have `sizes` completion tokens."""

    def split(column: Tensor | None) -> list[Any]:
        if column is None:
            return [None] * len(sizes)
        # copies, because pickling a view pickles the whole tensor
        return [part.clone() for part in column.detach().cpu().split(sizes)]

    columns = {name: split(column) for name, column in output._asdict().items()}
    return [
        TokenFigures(**{name: column[index] for name, column in columns.items()})
        for index in range(len(sizes))
    ]


def concatenated(figures: Sequence[TokenFigures]) -> DistillOutput:
    """All rollouts' figures, concatenated: float64, and bool for flags."""

    def concatenate(name: str) -> Any:
        tensors = [getattr(f, name) for f in figures]
        if any(tensor is None for tensor in tensors):
            return None
        column = torch.cat(tensors)
        return column if column.dtype == torch.bool else column.double()

    return DistillOutput(**{name: concatenate(name) for name in DistillOutput._fields})
