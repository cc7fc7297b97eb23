"""Loading the policy and its teacher."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from minidistill.config import Config
from minidistill.config.schema import LoraConfig
from minidistill.errors import UserError
from minidistill.models.weights import load_weights
from minidistill.placement.placement import Placement
from minidistill.trainer import attention
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

    Under LoRA the base is frozen and gets a new adapter (B = 0), whose initialization depends on
    `config.seed` only. Otherwise every weight is trained, and a frozen teacher is a second copy.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = config.trainer.model
    device = placement.devices[0] if device is None else device
    dtype = getattr(torch, placement.dtype)
    attention.register()
    implementation = placement.attention.implementation
    base = _load_weights(config, config.model.name, dtype, device, implementation)
    if placement.ac_freq:
        _checkpoint_activations(base, placement.ac_freq)
    teacher = teacher_weights(config)
    reference_models: dict[Weights, Any] = {}
    in_trainer = placement.teacher.scorer == "trainer"
    if in_trainer and teacher is Weights.OTHER:
        reference_models[Weights.OTHER] = _load_other(config, base, dtype, device, implementation)
    if settings.lora is False:
        model = base.requires_grad_(True)
        if in_trainer and teacher is Weights.BASE:
            reference_models[Weights.BASE] = frozen_copy(base)
    else:
        model = _with_adapter(config, settings.lora, base, placement.adapter_dtype)
    # only dropout and checkpointing need training mode
    dropout = settings.lora is not False and settings.lora.dropout > 0
    model.train(dropout or placement.ac_freq > 0)
    end_ids = _end_ids(base, tokenizer, end_of_turn_ids)
    policy = Policy(model, tokenizer, end_ids, device, teacher, reference_models)
    policy.attention = placement.attention
    if policy.lora and policy.head_VH.requires_grad:
        raise UserError(
            "the LM head would be trained",
            where="trainer.model.lora.target_modules",
            fix="leave the output embedding out: the loss needs one head for student and teacher",
        )
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
) -> Any:
    attention = {} if implementation is None else {"attn_implementation": implementation}
    return load_weights(config, name, key, dtype=dtype, **attention).to(device)


def _load_other(
    config: Config, base: Any, dtype: torch.dtype, device: torch.device, implementation: str | None
) -> Any:
    """A separate teacher model. Raises UserError if its head has another number of rows."""
    name = config.separate_teacher
    assert name is not None
    key = "teacher_inference.model.name"
    model = _load_weights(config, name, dtype, device, implementation, key)
    model.requires_grad_(False).eval()
    rows, needed = (m.get_output_embeddings().weight.shape[0] for m in (model, base))
    if rows != needed:
        raise UserError(
            f"the teacher's LM head has {rows} rows, the student's {needed}",
            where="teacher_inference.model.name",
            fix='set trainer.loss.estimator = "sampled" with inference.engine = "vllm", which '
            "compares the sampled tokens only",
        )
    return model


def _with_adapter(config: Config, lora: LoraConfig, base: Any, dtype: str | None) -> Any:
    import peft

    torch.manual_seed(config.seed)
    try:
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            # else the adapter gets the base's dtype, and peft casts neither inputs nor outputs
            autocast_adapter_dtype=dtype == "float32",
        )
    except ValueError as error:
        raise UserError(
            f"this model cannot have an adapter: {str(error).splitlines()[0]}",
            where="trainer.model.lora.target_modules",
            fix='use "all-linear" or names of linear layers that the model has',
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return model


def _checkpoint_activations(base: nn.Module, freq: int) -> None:
    """Recompute every freq-th decoder layer in backward."""
    base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = [m for m in base.modules() if getattr(m, "gradient_checkpointing", None) is True]
    layers = [m for m in layers if m is not getattr(base, "base_model", None)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % freq == 0  # type: ignore[assignment]


def _end_ids(base: Any, tokenizer: Any, end_of_turn_ids: Collection[int]) -> frozenset[int]:
    """Every id that ends a completion: of the generation config, tokenizer and chat templates."""
    configured = base.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    all_ids = [*ids, tokenizer.eos_token_id, *end_of_turn_ids]
    eos_ids = frozenset(id for id in all_ids if id is not None)
    if not eos_ids:
        raise UserError(
            "the model names no end-of-sequence token",
            where="model.name",
            fix="set eos_token_id in its generation_config.json",
        )
    return eos_ids
