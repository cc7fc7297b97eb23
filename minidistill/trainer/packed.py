"""Packed copies of the weights for passes of few tokens on a CPU.

A product with few rows reads a weight once and computes little. torch's own packs the weight again
each time, which takes longer than the product, and an adapter adds six small operations to each of
its layers. So a call that samples runs one role's layers from copies. Frozen weights that float16
holds exactly are copied once a run (half_weights.py), and the adapter's products are added. Others
are copied for each call, with the adapter folded in, in the layout of oneDNN's kernels.

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
from minidistill.trainer.half_weights import HalfWeights, half_product
from minidistill.trainer.lean_layers import plain_class
from minidistill.trainer.policy import Policy

MIN_PASSES = 5
"""In fewer passes the copy saves less time than it takes."""
MIN_PACKED = 1 << 16
"""Elements. A smaller weight stays in the processor's cache, where torch's product is as fast."""

Product = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def packed_weights(policy: Policy, rows: int) -> Iterator[Product]:
    """Run the current role's layers from copies, for passes of `rows` tokens.

    Yields what gives the logits of hidden states. Layers that cannot be copied run as they are.
    """
    head, output = policy.head, policy.causal.get_output_embeddings()
    changed: list[Any] = []
    try:
        for module in dict.fromkeys(_linears(policy.causal.get_decoder())):
            run = _layer_product(policy.half_weights, module, rows)
            if run is not None:
                module.forward = run
                changed.append(module)
        packed = _half(policy.half_weights, output)
        if packed is None:
            logits = _product(head.weight_VH.detach(), head.bias_V, rows)
        else:
            logits = partial(half_product, packed=packed)
        yield lambda hidden: head.mapped(logits(hidden))
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


def _layer_product(halves: HalfWeights, module: Any, rows: int) -> Product | None:
    """The product of a linear layer with its active adapters. None if it is not a plain one."""
    adapters = _adapters(module)
    if adapters is None:
        return None
    base = getattr(module, "base_layer", module)
    packed = _half(halves, base)
    if packed is None:
        weight = base.weight.detach()
        for down_RI, up_OR, scale in adapters:
            weight = torch.addmm(weight, up_OR, down_RI, alpha=scale)
        return _product(weight, None if base.bias is None else base.bias.detach(), rows)
    if not adapters:
        return partial(half_product, packed=packed)
    pairs = [(down.t().contiguous(), up.t().mul(scale)) for down, up, scale in adapters]
    return partial(_adapted_product, packed, [(a, b.contiguous()) for a, b in pairs])


def _half(halves: HalfWeights, layer: Any) -> Any:
    return halves.of(layer) if layer.weight.numel() >= MIN_PACKED else None


def _adapters(module: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """A (R, I), B (O, R) and the scale of a linear layer's active adapters. None if more than their
    products is to be added, or if the sum would be rounded to 16 bit."""
    from peft.tuners import lora

    if type(module) is nn.Linear:
        return []
    dtype = module.base_layer.weight.dtype
    if plain_class(module) is not lora.Linear or module.merged:
        return None
    if dtype not in (torch.float32, torch.float64):
        return None
    pairs = []
    for name in () if module.disable_adapters else module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = module.lora_A[name], module.lora_B[name]
        if name in module.lora_variant or up.bias is not None or down.weight.dtype != dtype:
            return None
        pairs.append((down.weight.detach(), up.weight.detach(), module.scaling[name]))
    return pairs


def _adapted_product(packed: Any, pairs: list[tuple[Tensor, Tensor]], states: Tensor) -> Tensor:
    output = half_product(states, packed)
    states_TI, output_TO = states.flatten(0, -2), output.flatten(0, -2)
    for down_IR, up_RO in pairs:
        output_TO.addmm_(states_TI @ down_IR, up_RO)
    return output


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
