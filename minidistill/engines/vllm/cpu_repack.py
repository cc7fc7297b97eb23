"""Loading full weights into a model that vLLM runs on a CPU: each layer is packed once complete.

vLLM's layer-wise reload reallocates every layer, loads it twice (once to count), packs the
embedding and copies it back, and leaves packed experts and a tied head unchanged. Here vLLM's
`load_weights` and loaders fill the layers and each is packed once. Models with anything but plain
linear layers, embeddings and unpacked parameters are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

Layer = Any  # a module with vLLM's attributes


class Repacker:
    """Takes all of a model's weights between `start` and `finish`.

    In between, a packed layer's weight is a meta tensor whose loader fills a real one. Everything
    else is loaded into the parameter that the model runs.
    """

    def __init__(self, linear: list[Layer], embeddings: list[Layer]) -> None:
        self._linear, self._embeddings = linear, embeddings
        self._missing: dict[Layer, int] = {}  # elements, by layer

    @classmethod
    def of(cls, model: nn.Module) -> Repacker:
        """Raises ValueError for a model with a layer of unknown packing."""
        linear, embeddings = [], []
        for name, layer in model.named_modules():
            method = type(getattr(layer, "quant_method", None))
            if method is UnquantizedLinearMethod and _is_packed(layer):
                linear.append(layer)
            elif method is UnquantizedEmbeddingMethod:
                embeddings.append(layer)
            elif not _is_plain(layer, method):
                kind = type(layer).__name__
                raise ValueError(f"{name} ({kind}) takes no new weights while vLLM runs on a CPU")
        return cls(linear, embeddings)

    def start(self) -> None:
        for layer in self._linear:
            self._missing[layer] = self._expect(layer)

    def finish(self) -> None:
        """Pack the LM head. Raises ValueError if a layer's weights did not all arrive."""
        if self._missing:
            raise ValueError(f"the weights of {len(self._missing)} layers are incomplete")
        heads = [layer for layer in self._embeddings if isinstance(layer, ParallelLMHead)]
        tied = [head.weight for head in heads]
        for layer in self._embeddings:
            if layer in heads or not any(layer.weight is weight for weight in tied):
                _pack(layer)
            else:  # tied: only looked up, and its packed copy would hold old weights
                layer.cpu_linear = nn.functional.linear

    def _expect(self, layer: Layer) -> int:
        """Prepare the layer's weight for loading; returns its number of elements."""
        # vLLM's description of the weight before packing, whose loader stays unchanged
        weight: Any = restore_layer_refs(to_meta_tensor(_described(layer)["weight"]), layer)
        load = _get_original_loader(weight)

        def fill(_: Tensor, loaded: Tensor, *arguments: Any, **named: Any) -> None:
            if layer.weight.is_meta:
                layer.weight = materialize_meta_tensor(weight)
            load(layer.weight, loaded, *arguments, **named)
            self._missing[layer] -= loaded.numel()
            if self._missing[layer] == 0:
                del self._missing[layer]
                _pack(layer)

        weight.weight_loader = fill
        layer.weight = weight
        return weight.numel()


def _described(layer: Layer) -> dict[str, Tensor]:
    """The parameters by name, as they were after loading and before processing."""
    return get_layerwise_info(layer).restore_metadata[0]


def _is_packed(layer: Layer) -> bool:
    """Whether the weight is a matrix and only its packed copy was kept."""
    described = _described(layer).get("weight")
    return described is not None and described.ndim == 2 and layer.weight.numel() == 0


def _is_plain(layer: Layer, method: type) -> bool:
    """Whether the model uses the layer's parameters exactly as vLLM loads them."""
    if is_deferred_attention_layer(layer):
        return type(layer) is Attention  # other kinds may cache products of weights
    if isinstance(layer, BaseLayerWithLoRA) or method is not type(None):
        return False
    if callable(getattr(layer, "process_weights_after_loading", None)):
        return False
    described = _described(layer)
    return all(
        (loaded := described.get(name)) is not None
        and (loaded.shape, loaded.dtype) == (used.shape, used.dtype)
        for name, used in layer.named_parameters(recurse=False)
    )


def _pack(layer: Layer) -> None:
    layer.cpu_linear = None  # frees the old copy first, to reuse its memory
    layer.quant_method.process_weights_after_loading(layer)
