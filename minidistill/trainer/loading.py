"""Loading the policy and its teacher."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from minidistill.config import Config
from minidistill.errors import UserError, blamed_on
from minidistill.models.auto import text_parameters
from minidistill.models.hub import TEACHER_KEY
from minidistill.models.weights import load_weights
from minidistill.placement.placement import Placement
from minidistill.trainer import attention
from minidistill.trainer.adapter import add_adapter
from minidistill.trainer.head import PRODUCT, find_logit_map
from minidistill.trainer.lean_layers import make_lean
from minidistill.trainer.modes import checkpoint_activations, set_dropout
from minidistill.trainer.policy import Policy, Weights, frozen_copy


def load_policy(
    config: Config,
    tokenizer: Any,
    placement: Placement,
    device: torch.device | None = None,
    end_of_turn_ids: Collection[int] = (),
) -> Policy:
    """The model on `device` (the driver's by default), with the teacher if it runs in the trainer.

    `end_of_turn_ids` are the tokens that end an assistant's turn in the chat templates.

    Under LoRA the base is frozen and gets an adapter: see `add_adapter`. Otherwise
    every weight is trained, and a frozen teacher is a second copy.
    """
    settings = config.trainer.model
    device = placement.devices[0] if device is None else device
    dtype = getattr(torch, placement.dtype)
    attention.register()
    implementation = placement.attention.implementation
    quantization = config.model.quantization
    base = _load_weights(
        config, config.model.name, dtype, device, implementation, quantization=quantization
    )
    logit_map = find_logit_map(base)
    if placement.ac_freq:
        checkpoint_activations(base, placement.ac_freq)
    teacher = teacher_weights(config)
    reference_models: dict[Weights, Any] = {}
    other_logit_map = PRODUCT
    in_trainer = placement.teacher.scorer == "trainer"
    if in_trainer and teacher is Weights.OTHER:
        other = _load_other(config, base, dtype, device, implementation)
        reference_models[Weights.OTHER] = other
        with blamed_on(TEACHER_KEY):
            other_logit_map = find_logit_map(other)
    if settings.lora is False:
        model = _trained(base)
        if in_trainer and teacher is Weights.BASE:
            reference_models[Weights.BASE] = frozen_copy(base)
    else:
        adapter_dtype = getattr(torch, placement.adapter_dtype or placement.dtype)
        model = add_adapter(settings.lora, base, adapter_dtype, config.seed)
        if device.type == "cpu" and not placement.sharded:
            make_lean(model)
    dropout = settings.lora is not False and settings.lora.dropout > 0
    set_dropout(model, dropout)
    end_ids = _end_ids(base, tokenizer, end_of_turn_ids)
    policy = Policy(model, tokenizer, end_ids, device, teacher, reference_models)
    policy.attention, policy.dropout = placement.attention, dropout
    policy.logit_map, policy.other_logit_map = logit_map, other_logit_map
    policy.starts_as_base = settings.lora is False or settings.lora.init is None
    if teacher is Weights.EMA:
        policy.add_ema()
    return policy


def teacher_weights(config: Config) -> Weights:
    """The weights that the teacher runs with."""
    if config.separate_teacher is not None:
        return Weights.OTHER
    by_update = {"frozen": Weights.BASE, "live": Weights.STUDENT, "ema": Weights.EMA}
    return by_update[config.orchestrator.teacher_model.update]


def _load_weights(
    config: Config,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str | None,
    key: str = "model.name",
    quantization: str | None = None,
) -> Any:
    arguments: dict[str, Any] = {"dtype": dtype}
    if implementation is not None:
        arguments["attn_implementation"] = implementation
    if quantization is not None:
        # weights are quantized on the device as they are read, and cannot be moved after that
        arguments |= {"quantization_config": four_bit(dtype), "device_map": {"": device}}
    model = load_weights(config, name, key, **arguments)
    return model if quantization else model.to(device)


def four_bit(dtype: torch.dtype) -> Any:
    """How transformers quantizes a model to NF4: linear layers except the head, with their scales
    quantized too, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_other(
    config: Config, base: Any, dtype: torch.dtype, device: torch.device, implementation: str | None
) -> Any:
    """A separate teacher model. Raises UserError if its head has another number of rows."""
    name = config.separate_teacher
    assert name is not None
    model = _load_weights(config, name, dtype, device, implementation, TEACHER_KEY)
    model.requires_grad_(False).eval()
    rows, needed = (m.get_output_embeddings().weight.shape[0] for m in (model, base))
    if rows != needed:
        raise UserError(
            f"the teacher's LM head has {rows} rows, the student's {needed}",
            where=TEACHER_KEY,
            fix='set trainer.loss.estimator = "sampled" with inference.engine = "vllm", which '
            "compares the sampled tokens only",
        )
    return model


def _trained(base: Any) -> Any:
    """The model with every weight trained that text reaches."""
    base.requires_grad_(False)
    for parameter in text_parameters(base):
        parameter.requires_grad_(True)
    return base


def _end_ids(base: Any, tokenizer: Any, end_of_turn_ids: Collection[int]) -> frozenset[int]:
    """Every id that ends a completion: of the generation config, tokenizer and chat templates."""
    configured = base.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    if wrong := [id for id in ids if not isinstance(id, int | None) or abs(id or 0) >= 1 << 31]:
        raise UserError(
            f"the model's end-of-sequence token is {str(wrong[0])[:60]!r}, which is no token id",
            where="model.name",
            fix="correct eos_token_id in its generation_config.json or config.json",
        )
    all_ids = [*ids, tokenizer.eos_token_id, *end_of_turn_ids]
    eos_ids = frozenset(id for id in all_ids if id is not None)
    if not eos_ids:
        raise UserError(
            "the model names no end-of-sequence token",
            where="model.name",
            fix="set eos_token_id in its generation_config.json",
        )
    return eos_ids
