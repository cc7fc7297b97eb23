"""Dropout, adapters and activation checkpointing, without transformers' training mode.

In training mode a model turns on every dropout that its configuration names. Here the model stays
in evaluation mode in every pass. Only the adapter's dropout is switched, and layers are
checkpointed by a class of our own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from minidistill.models.auto import decoder_layers


def set_dropout(model: nn.Module, on: bool) -> None:
    """Turn the dropout of the model's adapters on or off, and all other dropout off."""
    model.eval()
    for layer in model.modules() if on else ():
        if isinstance(layer, LoraLayer):
            layer.training = True  # of this module alone: the layer under it stays as it is
            for dropout in layer.lora_dropout.values():
                dropout.train()


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base alone in passes.

    peft's `disable_adapter` also reports the state of each layer and sets twice which tensors are
    trained. For 210 layers that takes 75 ms, and this takes 2.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


class Checkpointed:
    """A layer whose activations are computed again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def checkpoint_activations(causal: Any, freq: int) -> None:
    """Recompute every freq-th decoder layer in backward.

    Each gets a class derived from its own, which a copy of the model keeps.
    """
    for layer in decoder_layers(causal)[::freq]:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (Checkpointed, kind), {})
