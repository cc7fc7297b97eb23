"""Which class of transformers loads a model, and the part of a multimodal one that reads text."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from minidistill.errors import UserError


def model_class(model_config: Any) -> Any:
    """The class that loads a model for text, by its configuration.

    A multimodal model is used for text alone. Raises UserError for a model that generates no text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    remote = (getattr(model_config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if remote is not None or type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"{model_config.model_type} models do not generate text token by token",
        where="model.name",
        fix="use a causal language model, or a multimodal one that answers in text",
    )


def skeleton(model_config: Any) -> Any:
    """The model without weights, on torch's meta device.

    Raises UserError for a configuration that transformers makes no model of.
    Code that comes with a model runs only if its configuration was made by such code, and so with
    the user's permission.
    """
    trusted = type(model_config).__module__.startswith("transformers_modules.")
    kind = model_class(model_config)
    try:
        with torch.device("meta"):
            return kind.from_config(model_config, trust_remote_code=trusted)
    except Exception as error:  # a value of any kind in config.json ends in any exception
        raise UserError(
            f"no {model_config.model_type} model can be made of this config.json: "
            f"{type(error).__name__}: {error}",
            where="model.name",
            fix="use the config.json that belongs to the model",
        ) from error


def is_multimodal(model_config: Any) -> bool:
    """Whether the language model is only a part of the model."""
    return model_config.get_text_config() is not model_config


def is_recurrent(model_config: Any) -> bool:
    """Whether a layer's cache is more than keys and values: a state that every token changes."""
    from transformers import DynamicCache

    return not all(map(keeps_tokens, DynamicCache(config=model_config).layers))


def keeps_tokens(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values of tokens, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def text_parts(model: Any) -> list[nn.Module]:
    """What text reaches: the whole of a language model, or a multimodal one's decoder and head."""
    if not is_multimodal(model.config):
        return [model]
    return [model.get_decoder(), model.get_output_embeddings()]


def text_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters that text reaches, which are those that can be trained; tied ones once."""
    parts = text_parts(model)
    return list({id(p): p for part in parts for p in part.parameters()}.values())


def outside_text(model: Any) -> str:
    """A pattern of the names of modules that text does not reach; empty for a language model.

    They are those outside `text_parts`: a vision tower, its projector.
    """
    inside = {id(module) for part in text_parts(model) for module in part.modules()}
    outside = [name for name, m in model.named_modules() if not inside & set(map(id, m.modules()))]
    top = [n for n in outside if n.rpartition(".")[0] not in outside]
    return f"({'|'.join(map(re.escape, top))})(\\..*)?" if top else ""


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the decoder that reads text.

    They are its first list of as many modules as the configuration has layers, or else its first
    list. Experts and a vision tower may have longer ones. Raises UserError if there is none.
    """
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    count = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in lists if len(m) == count), lists[0] if lists else None)
    if layers is None:
        raise UserError(
            f"the layers of {type(model).__name__} are not in a list, so they cannot be sharded or "
            "recomputed one by one",
            where="model.name",
            fix="set trainer.shard = false and trainer.model.ac = false, or use another model",
        )
    return list(layers)


def text_linears(model: Any) -> list[tuple[str, Any]]:
    """The linear layers that text reaches, by name, without the LM head. GPT-2's are `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    head, elsewhere = model.get_output_embeddings(), outside_text(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not re.fullmatch(elsewhere, name)
    ]


def matches(name: str, target: str) -> bool:
    """Whether an adapter's target selects a module, as peft decides it."""
    return name == target or name.endswith(f".{target}")
