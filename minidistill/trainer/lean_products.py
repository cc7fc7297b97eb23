"""Linear layers with an adapter, and gated MLPs of them, with few passes over memory.

The output of a layer is x Wᵀ + b + s (x Aᵀ) Bᵀ, for a frozen weight W and an adapter A, B. The
adapter's part is added in place, and its gradient too. What is cheap to compute again is not kept
for the backward pass: a norm's output, and in an MLP everything but the outputs of gate and up.

Shapes: `_T` tokens, `_I` inputs, `_O` outputs, `_R` rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from minidistill_kernels.gemm import linear

Gradients = tuple[Tensor | None, Tensor | None]
"""Of A and B."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A frozen linear layer with its adapter, which may be absent."""

    weight_OI: Tensor
    bias_O: Tensor | None
    down_RI: Tensor | None
    """A."""
    up_OR: Tensor | None
    """B."""
    scale: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight_OI, self.bias_O, self.down_RI, self.up_OR

    def product(self, x_TI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output (T, O), and x Aᵀ (T, R) for the backward pass."""
        y_TO = linear(x_TI, self.weight_OI, self.bias_O)
        if self.down_RI is None or self.up_OR is None:
            return y_TO, None
        reduced_TR = x_TI @ self.down_RI.t()
        y_TO.addmm_(reduced_TR, self.up_OR.t(), alpha=self.scale)
        return y_TO, reduced_TR

    def pull_back(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        reduced_TR: Tensor | None,
        dx_TI: Tensor | None,
        needs_dx: bool = True,
    ) -> tuple[Tensor | None, Gradients]:
        """The gradients of x, which are added to `dx_TI` if that is given, and of A and B."""
        if needs_dx:
            if dx_TI is None:
                dx_TI = linear(dy_TO, self.weight_OI.t())
            else:
                dx_TI.add_(linear(dy_TO, self.weight_OI.t()))
        if self.down_RI is None or self.up_OR is None or reduced_TR is None:
            return dx_TI, (None, None)
        d_reduced_TR = (dy_TO @ self.up_OR).mul_(self.scale)
        if needs_dx and dx_TI is not None:
            dx_TI.addmm_(d_reduced_TR, self.down_RI)
        d_up_OR = (dy_TO.t() @ reduced_TR).mul_(self.scale)
        return dx_TI, (d_reduced_TR.t() @ x_TI, d_up_OR)


@dataclass(frozen=True, slots=True)
class Normed:
    """How a norm's output follows from its input: x, 1 / rms(x) and the weight."""

    x: Tensor
    inverse: Tensor
    weight: Tensor

    def value(self) -> Tensor:
        return (self.x * self.inverse).mul_(self.weight)


class RmsNorm(torch.autograd.Function):
    """weight · x / rms(x) for a frozen weight, in fp32. Also returns 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = Normed(x, inverse, weight)
        ctx.save_for_backward(x, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return normed.value(), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, unused: Any) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        d_normed = dy * weight
        projection = (d_normed * x).mean(-1, keepdim=True) * inverse.pow(3)
        return d_normed.mul_(inverse).addcmul_(x, projection, value=-1), None, None


class AdaptedProduct(torch.autograd.Function):
    """`Adapted.product` of x (..., I). `normed` is how x is computed again; without it x is kept.

    The arguments are those of `Adapted`, and the tensors of `Normed` or three times None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *tensors: Tensor | None) -> Tensor:
        layer, normed = _layer(tensors[:4], scale), tensors[4:]
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO, reduced_TR = layer.product(x_TI)
        kept = None if normed[0] is not None else x_TI
        ctx.save_for_backward(kept, reduced_TR, *tensors)
        ctx.scale = scale
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, reduced_TR, *tensors = ctx.saved_tensors
        layer = _layer(tensors[:4], ctx.scale)
        x_TI = _input(kept, tensors[4:])
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx_TI, (d_down, d_up) = layer.pull_back(
            dy_TO, x_TI, reduced_TR, None, ctx.needs_input_grad[0]
        )
        dx = None if dx_TI is None else dx_TI.view(*dy.shape[:-1], -1)
        return dx, None, None, None, d_down, d_up, None, None, None


class GatedProduct(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)), each a layer as in `Adapted`; x as in `AdaptedProduct`.

    The arguments are x, the three scales, and the tensors of gate, up, down and x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        gate_layer, up_layer, down_layer = _layers(tensors, scales)
        x_TI = x.reshape(-1, x.shape[-1])
        gate, gate_reduced = gate_layer.product(x_TI)
        up, up_reduced = up_layer.product(x_TI)
        y, down_reduced = down_layer.product(silu(gate).mul_(up))
        kept = None if tensors[12] is not None else x_TI
        ctx.save_for_backward(kept, gate, up, gate_reduced, up_reduced, down_reduced, *tensors)
        ctx.scales = scales
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, gate, up, gate_reduced, up_reduced, down_reduced, *tensors = ctx.saved_tensors
        gate_layer, up_layer, down_layer = _layers(tensors, ctx.scales)
        dy_TO = dy.reshape(-1, dy.shape[-1])
        active = silu(gate)
        d_inner, of_down = down_layer.pull_back(dy_TO, active * up, down_reduced, None)
        assert d_inner is not None
        d_up = active.mul_(d_inner)
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)
        del d_inner
        x_TI, needs_dx = _input(kept, tensors[12:]), ctx.needs_input_grad[0]
        dx_TI, of_up = up_layer.pull_back(d_up, x_TI, up_reduced, None, needs_dx)
        dx_TI, of_gate = gate_layer.pull_back(d_gate, x_TI, gate_reduced, dx_TI, needs_dx)
        dx = None if dx_TI is None else dx_TI.view(*dy.shape[:-1], -1)
        parts = [None, None, *of_gate, None, None, *of_up, None, None, *of_down]
        return dx, None, *parts, None, None, None


def _layer(tensors: Sequence[Tensor | None], scale: float) -> Adapted:
    weight_OI, bias_O, down_RI, up_OR = tensors
    assert weight_OI is not None
    return Adapted(weight_OI, bias_O, down_RI, up_OR, scale)


def _layers(tensors: Sequence[Tensor | None], scales: tuple[float, ...]) -> list[Adapted]:
    return [_layer(tensors[4 * i : 4 * i + 4], scale) for i, scale in enumerate(scales)]


def _input(kept: Tensor | None, normed: Any) -> Tensor:
    """The input (T, I) of a product: what was kept, or a norm's output once more."""
    x = Normed(*normed).value() if kept is None else kept
    return x.reshape(-1, x.shape[-1])
