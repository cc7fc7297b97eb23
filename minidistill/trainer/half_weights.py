"""Frozen fp32 weights in float16, packed once a run, for products of few rows on a CPU.

Such a product waits for the weight's bytes. Checkpoints are published in 16 bit, so their fp32
weights fit in float16 without a loss, which halves the bytes. FBGEMM's kernel widens them in its
registers and computes in fp32. Weights that float16 would change are not taken.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

EXACT = 2**-21
"""The largest error of a weight in float16, relative to its norm: far below that of an fp32
product. Of bfloat16 weights only those below 2^-17 are rounded."""
ROWS = 4096
"""Compared at a time."""


class HalfWeights:
    """Packed copies of frozen weights, by layer. A weight that has changed is packed again."""

    def __init__(self) -> None:
        self._packed: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()

    def of(self, layer: Any) -> Any:
        """What `half_product` takes for a layer. None if float16 would change its weight."""
        weight: Tensor = layer.weight
        if weight.requires_grad or weight.dtype != torch.float32:
            return None
        now = weight.data_ptr(), weight._version
        made_of, packed = self._packed.get(layer, (None, None))
        if made_of != now:
            packed = _pack(weight.detach(), layer.bias) if _is_exact(weight.detach()) else None
            self._packed[layer] = now, packed
        return packed


def half_product(states: Tensor, packed: Any) -> Tensor:
    """x Wᵀ + b of fp32 states (..., inputs)."""
    output: Tensor = torch.ops.quantized.linear_dynamic_fp16(states, packed)
    return output


def _pack(weight: Tensor, bias: Tensor | None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight, None if bias is None else bias.detach())


def _is_exact(weight: Tensor) -> bool:
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return False
    error = norm = 0.0
    for part in weight.split(ROWS):
        error += float((part.half().float() - part).square().sum())
        norm += float(part.square().sum())
    return error <= EXACT**2 * norm
