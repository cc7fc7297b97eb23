"""A decoder's layers that train an adapter on a CPU in fp32 with less memory and less time.

`make_lean` gives norms, linear layers and MLPs a class derived from their own. It computes the same
up to float error (`lean_products.py`).
Layers are recognized by what they compute: one of each class is tried on a random input.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from minidistill.trainer.lean_products import (
    Adapted,
    AdaptedProduct,
    GatedProduct,
    Normed,
    RmsNorm,
)

NORMED = "_normed"
"""The attribute of a norm's output: its version, and how it is computed again."""
LEAN = "_lean_base"
"""The attribute of a derived class: the class that it computes the same as."""
NOTHING = (None, None, None)
TOKENS = 4
TOLERANCE = 1e-5  # of the largest output


class LeanLinear:
    """A linear layer of peft with an adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = None if args or kwargs else adapted(self)
        if layer is None or x.dtype != layer.weight_OI.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        if not torch.is_grad_enabled():
            return layer.product(x.reshape(-1, x.shape[-1]))[0].view(*x.shape[:-1], -1)
        if layer.down_RI is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return AdaptedProduct.apply(x, layer.scale, *layer.tensors, *_normed(x))  # type: ignore[no-any-return,no-untyped-call]


class LeanMlp:
    """down(silu(gate(x)) · up(x))."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = args or kwargs or not torch.is_grad_enabled()
        layers = None if plain else gated_layers(self)
        if layers is None or all(layer.down_RI is None for layer in layers):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        tensors = [tensor for layer in layers for tensor in layer.tensors]
        scales = tuple(layer.scale for layer in layers)
        return GatedProduct.apply(x, scales, *tensors, *_normed(x))  # type: ignore[no-any-return,no-untyped-call]


class LeanNorm:
    """weight · x / rms(x)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, eps = self.weight, _eps(self)  # type: ignore[attr-defined]
        plain = args or kwargs or not x.requires_grad or x.dtype != torch.float32
        if plain or weight.requires_grad or eps is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        output, inverse = RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        setattr(output, NORMED, (output._version, (x.detach(), inverse, weight)))
        return output  # type: ignore[no-any-return]


def make_lean(model: nn.Module) -> None:
    """Derive the classes of the layers that can be lean. `model` has an adapter."""
    derived: dict[type, type] = {}
    for module in model.modules():
        base = type(module)
        if base not in derived:  # one module of a class is tried for all
            kind = _lean_kind(module)
            derived[base] = (
                base if kind is None else type(base.__name__, (kind, base), {LEAN: base})
            )
        if derived[base] is not base:
            module.__class__ = derived[base]


def plain_class(module: nn.Module) -> type:
    """The class of a layer before it was made lean."""
    kind = type(module)
    return getattr(kind, LEAN, kind)


def _lean_kind(module: nn.Module) -> type | None:
    if type(module) is LoraLinear:
        return LeanLinear
    if (layers := gated_layers(module)) is not None:
        return LeanMlp if _is_gated(module, layers) else None
    if _eps(module) is not None and _is_rms_norm(module):
        return LeanNorm
    return None


def adapted(module: Any) -> Adapted | None:
    """A linear layer's tensors as it computes now; None for what `Adapted` does not describe."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        lean = weight.dtype == torch.float32 and not weight.requires_grad
        return Adapted(weight, bias, None, None, 0.0) if lean else None
    if not isinstance(module, LoraLinear):
        return None
    base = adapted(module.base_layer)
    names = [name for name in module.active_adapters if name in module.lora_A]
    if base is None or module.disable_adapters or not names:
        return base
    name, layer = names[0], cast("Any", module)
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    special = layer.merged or name in layer.lora_variant or up.bias is not None
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    if len(names) > 1 or special or drops or down.weight.dtype != base.weight_OI.dtype:
        return None
    return Adapted(base.weight_OI, base.bias_O, down.weight, up.weight, float(layer.scaling[name]))


def gated_layers(module: Any) -> list[Adapted] | None:
    """Gate, up and down of an MLP by the names that they have in transformers."""
    names = ("gate_proj", "up_proj", "down_proj")
    layers = [adapted(getattr(module, name, None)) for name in names]
    found = [layer for layer in layers if layer is not None]
    return found if len(found) == len(names) else None


def _normed(x: Tensor) -> tuple[Tensor | None, ...]:
    """How x is computed again, if it is a norm's output that nobody has changed in place."""
    version, normed = getattr(x, NORMED, (0, NOTHING))
    return normed if x._version == version else NOTHING


def _eps(module: Any) -> float | None:
    """The ε of a norm that has nothing but a weight."""
    if [*module._parameters] != ["weight"] or module._modules or module.weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, int | float) else None


@torch.no_grad()
def _is_gated(module: Any, layers: list[Adapted]) -> bool:
    gate, up, down = layers
    x_TI = _random_input(gate.weight_OI.shape[1], gate.weight_OI)
    inner = nn.functional.silu(gate.product(x_TI)[0]) * up.product(x_TI)[0]
    return _same(module, x_TI, down.product(inner)[0])


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    x_TI = _random_input(len(module.weight), module.weight)
    inverse = torch.rsqrt(x_TI.square().mean(-1, keepdim=True) + (_eps(module) or 0.0))
    return _same(module, x_TI, Normed(x_TI, inverse, module.weight).value())


def _random_input(width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, width, generator=generator).to(like)


def _same(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    """Whether the module gives this output. Any exception of its own means no."""
    try:
        output = module(x)
    except Exception:
        return False
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    difference = float((output - expected).abs().max())
    return difference <= TOLERANCE * float(expected.abs().max())
