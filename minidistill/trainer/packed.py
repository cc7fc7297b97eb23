"""Copies of the weights for passes of few tokens on a CPU: the adapter folded in, packed.

A product with few rows reads a weight once and computes little. torch's own packs the weight anew
each time, which takes longer than the product, and an adapter adds six small operations to each of
its layers. So a call that samples makes a copy of one role's weights in the layout of oneDNN's
kernels. The layers run it until the call ends.

Only weights in full precision are folded: in 16 bit the sum would lose most of the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.placement.limits import PACKED_SHARE
from minidistill.placement.machine import Machine
from minidistill.trainer.lean_layers import plain_class
from minidistill.trainer.policy import Policy

MIN_PASSES = 5
"""In fewer passes the copy saves less time than it takes."""
MIN_PACKED = 1 << 16
"""Elements. A smaller weight stays in the processor's cache, where torch's product is as fast."""

Product = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def packed_weights(policy: Policy, rows: int) -> Iterator[Product]:
    """Run the current role's layers from copies made for passes of `rows` tokens.

    Yields what gives the logits of hidden states. Layers that cannot be copied run as they are.
    """
    head = policy.head
    changed: list[Any] = []
    try:
        for module in dict.fromkeys(_linears(policy.causal.get_decoder())):
            weight = _folded(module)
            if weight is not None:
                module.forward = _product(weight, _bias(module), rows)
                changed.append(module)
            del weight
        run = _product(head.weight_VH.detach(), head.bias_V, rows)
        yield lambda hidden: head.mapped(run(hidden))
    finally:
        for module in changed:
            del module.forward


def can_pack(policy: Policy, passes: int) -> bool:
    """Whether copies of the current role's weights save time in `passes`, and memory allows them.

    It depends on nothing that changes in a run, because a copy's rounding differs.
    """
    if policy.device.type != "cpu" or policy.sharded is not None or passes < MIN_PASSES:
        return False
    if policy.dtype not in (torch.float32, torch.float64):
        return False
    linears = _linears(policy.causal.get_decoder())
    size: int = sum(getattr(m, "base_layer", m).weight.nbytes for m in linears)
    return size + policy.head_VH.nbytes <= PACKED_SHARE * Machine.local().bytes


def _linears(module: nn.Module) -> Iterator[Any]:
    """The linear layers below a module: plain ones, and those with an adapter as a whole."""
    from peft.tuners.lora import LoraLayer

    for child in module.children():
        if type(getattr(child, "base_layer", child)) is nn.Linear:
            yield child
        elif not isinstance(child, LoraLayer):
            yield from _linears(child)


def _folded(module: Any) -> Tensor | None:
    """The weight of a linear layer with its active adapters, (out, in). None if it is not plain."""
    from peft.tuners import lora

    if type(module) is nn.Linear:
        return module.weight.detach()
    if plain_class(module) is not lora.Linear:
        return None
    base: Any = module.base_layer
    weight = base.weight.detach()
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or weight.dtype not in (torch.float32, torch.float64):
        return None
    for name in () if module.disable_adapters else active:
        down, up = module.lora_A[name], module.lora_B[name]
        if name in module.lora_variant or up.bias is not None or down.weight.dtype != weight.dtype:
            return None
        weight = torch.addmm(
            weight, up.weight.detach(), down.weight.detach(), alpha=module.scaling[name]
        )
    return weight


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "base_layer", module).bias
    return None if bias is None else bias.detach()


def _product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """x Wᵀ + bias, from a packed copy where that is faster."""
    if (
        weight.dtype == torch.float32
        and weight.numel() >= MIN_PACKED
        and torch.backends.mkldnn.is_available()
    ):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return partial(_packed_product, packed, bias)
    return partial(nn.functional.linear, weight=weight, bias=bias)


def _packed_product(packed: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return product
