"""Per-token figures in and out of the objective: an engine's scores, and what a step records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidistill.placement.teacher import Estimator
from minidistill.types import Rollout, TeacherScores
from minidistill_kernels import DistillOutput

Figures = dict[int, list[Tensor]]
"""By rollout, each a list of tensors in the order of `DistillOutput`."""


def engine_scores(
    scores: Sequence[TeacherScores],
    rollouts: Sequence[Rollout],
    estimator: Estimator,
    device: torch.device,
) -> dict[str, Any]:
    """An engine's scores as arguments of the objective."""
    logp_N = torch.tensor([p for s in scores for p in s.logprobs], device=device)
    if estimator == "sampled":
        return {"teacher_logp_N": logp_N}
    ids_NK = np.concatenate([r.completion.top_ids for r in rollouts])
    top_NK = np.concatenate([s.top for s in scores])
    return {
        "teacher_logp_N": logp_N,
        "topk_ids_NK": torch.as_tensor(ids_NK, dtype=torch.int64, device=device),
        "teacher_topk_logp_NK": torch.as_tensor(top_NK, dtype=torch.float32, device=device),
    }


def per_rollout(output: DistillOutput, sizes: list[int]) -> list[list[Tensor]]:
    """A micro-batch's figures by rollout, each a list in the order of `DistillOutput`."""
    # an engine tells no entropy
    columns = [torch.full_like(output.logp, math.nan) if t is None else t.detach() for t in output]
    return [list(parts) for parts in zip(*(t.cpu().split(sizes) for t in columns), strict=True)]
