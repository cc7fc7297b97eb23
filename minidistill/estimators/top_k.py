"""The reverse KL over the student's k most likely ids and one bucket for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minidistill.estimators.base import Estimator, TeacherInputs, TeacherNeeds
from minidistill.types import Completion, TeacherScores

if TYPE_CHECKING:
    import torch


class TopK(Estimator):
    """The sum of `full`, with all ids but the k most likely in one bucket."""

    name = kernel_mode = "top_k"
    needs = TeacherNeeds.LOGPROBS_AT_IDS

    def top_ids(self, top_k: int) -> int:
        return top_k

    def engine_scores(
        self,
        scores: Sequence[TeacherScores],
        completions: Sequence[Completion],
        device: torch.device,
    ) -> TeacherInputs:
        import numpy as np
        import torch

        ids_NK = np.concatenate([np.asarray(c.top_ids) for c in completions])
        logp_NK = np.concatenate([np.asarray(s.top) for s in scores])
        return {
            "teacher_logp_N": torch.tensor([p for s in scores for p in s.logprobs], device=device),
            "topk_ids_NK": torch.as_tensor(ids_NK, dtype=torch.int64, device=device),
            "teacher_topk_logp_NK": torch.as_tensor(logp_NK, dtype=torch.float32, device=device),
        }


TOP_K = TopK()
