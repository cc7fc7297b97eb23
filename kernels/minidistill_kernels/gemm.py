"""The matrix products before and after the row kernels.

Legend: _C tokens of a chunk, _H hidden, _V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# On a CPU, rows of a low-precision head that are converted to fp32 at a time.
TILE = 4096


def project(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
    """out = hidden @ weight.T. On a CPU the arithmetic is fp32 for every input dtype."""
    if hidden_CH.is_cuda:
        if out_CV.dtype == hidden_CH.dtype:
            torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
        else:
            torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
        return
    hidden_CH = hidden_CH.float()
    if weight_VH.dtype == torch.float32:
        torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
        return
    for i in range(0, weight_VH.shape[0], TILE):
        out_CV[:, i : i + TILE] = hidden_CH @ weight_VH[i : i + TILE].float().t()


def pull_back(dlogits_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """dlogits @ weight, (C, H), accumulated in fp32; one product over the vocabulary on CUDA."""
    if dlogits_CV.is_cuda:
        dlogits_CV = dlogits_CV.to(weight_VH.dtype)
        if weight_VH.dtype == torch.float16:  # small unscaled gradients vanish in fp16
            return torch.mm(dlogits_CV, weight_VH, out_dtype=torch.float32)
        return dlogits_CV @ weight_VH
    if weight_VH.dtype == torch.float32:
        return dlogits_CV @ weight_VH
    out_CH = dlogits_CV.new_zeros(dlogits_CV.shape[0], weight_VH.shape[1])
    for i in range(0, weight_VH.shape[0], TILE):
        out_CH.addmm_(dlogits_CV[:, i : i + TILE], weight_VH[i : i + TILE].float())
    return out_CH


def add_outer(out_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
    """out += dlogits.T @ hidden in fp32, the chunk's part of the head's gradient."""
    if hidden_CH.is_cuda and hidden_CH.dtype != torch.float32:
        dlogits_CV = dlogits_CV.to(hidden_CH.dtype)
        out_VH += torch.mm(dlogits_CV.t(), hidden_CH, out_dtype=torch.float32)
    else:
        out_VH.addmm_(dlogits_CV.float().t(), hidden_CH.float())
