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


def outside_text(model: Any) -> str:
    """A pattern of the names of modules that text does not reach; empty for a language model.

    They are those outside the decoder and the head: a vision tower, its projector.
    """
    if not is_multimodal(model.config):
        return ""
    parts = (model.get_decoder(), model.get_output_embeddings())
    inside = {id(module) for part in parts for module in part.modules()}
    outside = [name for name, m in model.named_modules() if not inside & set(map(id, m.modules()))]
    top = [n for n in outside if n.rpartition(".")[0] not in outside]
    return f"({'|'.join(map(re.escape, top))})(\\..*)?" if top else ""


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
