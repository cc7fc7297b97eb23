"""The objective's settings, and its per-token figures by rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator, LossSettings
from minidistill.types import TokenFigures
from minidistill_kernels import DistillOutput


def loss_settings(config: Config, estimator: Estimator, vocabulary: int) -> LossSettings:
    """The configured numbers of the objective, `auto` resolved, for a head of that many rows."""
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
        top_k=min(loss.top_k, vocabulary),
        ratio_clip_high=loss.ratio_clip_high,
        token_mask_low=loss.token_mask_low,
        token_mask_high=loss.token_mask_high,
        kl_clip=kl_clip,
    )


def figures_by_rollout(output: DistillOutput, sizes: list[int]) -> list[TokenFigures]:
    """A micro-batch's figures for each of its rollouts, which have `sizes` completion tokens."""

    def parts(column: Tensor | None) -> list[Any]:
        if column is None:
            return [None] * len(sizes)
        # copies, because a view is pickled with the whole tensor that it is a view of
        return [part.clone() for part in column.detach().cpu().split(sizes)]

    columns = {name: parts(column) for name, column in output._asdict().items()}
    return [
        TokenFigures(**{name: column[index] for name, column in columns.items()})
        for index in range(len(sizes))
    ]


def concatenated(figures: Sequence[TokenFigures]) -> DistillOutput:
    """All rollouts' figures in a row: float64, and bool for flags."""

    def column(name: str) -> Any:
        parts = [getattr(f, name) for f in figures]
        if any(part is None for part in parts):
            return None
        joined = torch.cat(parts)
        return joined if joined.dtype == torch.bool else joined.double()

    return DistillOutput(**{name: column(name) for name in DistillOutput._fields})
