"""The matrix products before and after the row kernels, and those of linear layers on a CPU.

Legend: _C tokens of a chunk, _H hidden, _V vocabulary; _T tokens, _I inputs, _O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# On a CPU, rows of the head that are multiplied at a time, and converted to fp32 if need be.
TILE = 4096
# With fewer rows or smaller weights, oneDNN's copy of the weight costs more than it saves.
MIN_ROWS, MIN_WEIGHT = 16, 1 << 16


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without a gradient. W may be a view, so that x @ W is `linear(x, W.t())`.

    In fp32 on a CPU oneDNN's product is faster than torch's own, which is MKL's.
    """
    if (
        x_TI.device.type == "cpu"
        and x_TI.dtype == weight_OI.dtype == torch.float32
        and x_TI.shape[0] >= MIN_ROWS
        and weight_OI.numel() >= MIN_WEIGHT
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_TI, weight_OI, bias_O, "none", [], ""
        )
        return product
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def project(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
    """out = hidden @ weight.T. On a CPU the arithmetic is fp32 for every input dtype."""
    if hidden_CH.is_cuda:
        if out_CV.dtype == hidden_CH.dtype:
            torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
        else:
            torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
        return
    hidden_CH = hidden_CH.float()
    for i in range(0, weight_VH.shape[0], TILE):
        out_CV[:, i : i + TILE] = linear(hidden_CH, weight_VH[i : i + TILE].float())


def pull_back(dlogits_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """dlogits @ weight, (C, H), accumulated in fp32; one product over the vocabulary on CUDA."""
    if dlogits_CV.is_cuda:
        dlogits_CV = dlogits_CV.to(weight_VH.dtype)
        if weight_VH.dtype == torch.float16:  # small unscaled gradients vanish in fp16
            return torch.mm(dlogits_CV, weight_VH, out_dtype=torch.float32)
        return dlogits_CV @ weight_VH
    if weight_VH.dtype == torch.float32:
        return linear(dlogits_CV, weight_VH.t())
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
