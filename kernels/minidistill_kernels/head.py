"""The LM head as the functions on hidden states take it.

Legend: _N tokens, _C tokens of a chunk, _H hidden, _V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A head whose logits are not the product alone: scale (h Wᵀ + bias), softly capped.

    A soft cap c turns a logit l into c tanh(l / c).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Above 0."""
    cap: float | None = None

    @classmethod
    def of(cls, head: Tensor | Head) -> Head:
        """The head itself; a bare weight has no bias, scale or cap."""
        return head if isinstance(head, Head) else cls(head)

    @property
    def product_cap(self) -> float | None:
        """The cap on h Wᵀ + bias, so that `scale` applies to what is capped: c tanh(l / c)."""
        return None if self.cap is None else self.cap / self.scale

    def detach(self) -> Head:
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return self._replace(weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """(N, V), in the dtype of the head, or fp32 if they are scaled or capped."""
        return self.mapped(torch.nn.functional.linear(hidden_NH, self.weight_VH, self.bias_V))

    def mapped(self, logits_NV: Tensor) -> Tensor:
        """The logits of h Wᵀ + bias."""
        if self.scale != 1.0 or self.cap is not None:
            logits_NV = logits_NV.float() * self.scale
        if self.cap is not None:
            logits_NV = self.cap * torch.tanh(logits_NV / self.cap)
        return logits_NV


def finish(product_CV: Tensor, bias_V: Tensor | None, cap: float | None) -> None:
    """Turn fp32 products h Wᵀ into unscaled logits, in place."""
    if bias_V is not None:
        product_CV += bias_V
    if cap is not None:
        product_CV.div_(cap).tanh_().mul_(cap)


def slope(logits_CV: Tensor, cap: float) -> Tensor:
    """The derivative of capped logits with respect to what was capped, 1 - (l / c)², fp32."""
    return (logits_CV / cap).square_().neg_().add_(1.0)
