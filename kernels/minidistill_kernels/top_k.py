"""Selects the columns of a chunk of logits for the top-k estimator.

Legend: _C tokens of a chunk, _V vocabulary, _K ids per token, _G groups of ids, _M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill_kernels.objective import Objective, Picked


def pick(
    s_CV: Tensor, x_CV: Tensor | None, ids_CK: Tensor | None, obj: Objective, pair: bool
) -> Picked:
    """The columns `ids_CK`, by default the k largest of each row.

    `x_CV` has the student's minus the teacher's logits, or with `pair` the teacher's.
    """
    vocab = s_CV.shape[1]
    if ids_CK is None:
        ids_CK = _largest(s_CV, min(obj.top_k, vocab))
    ids_CK = ids_CK.to(torch.int64)
    top_CK = s_CV.gather(1, ids_CK)
    delta_CK = None
    if x_CV is not None:
        delta_CK = x_CV.gather(1, ids_CK).float()
        delta_CK = top_CK - delta_CK if pair else delta_CK
    return Picked(ids_CK, top_CK, delta_CK, ids_CK.shape[1] == vocab)


def _largest(s_CV: Tensor, k: int, group: int = 64) -> Tensor:
    """Ids of the k largest logits; on a CPU, sought in the k groups with the largest maxima."""
    vocab = s_CV.shape[1]
    groups = vocab // group
    if s_CV.is_cuda or k * 4 > groups:
        return s_CV.topk(k, dim=1, sorted=False).indices
    whole = groups * group
    top_CG = s_CV[:, :whole].unflatten(1, (groups, group)).amax(2).topk(k, sorted=False).indices
    inside = torch.arange(group, device=s_CV.device)
    ids_CM = (top_CG[:, :, None] * group + inside).flatten(1)
    tail = torch.arange(whole, vocab, device=s_CV.device).expand(len(s_CV), -1)
    ids_CM = torch.cat([ids_CM, tail], 1)
    best_CK = s_CV.gather(1, ids_CM).topk(k, sorted=False).indices
    return ids_CM.gather(1, best_CK)
