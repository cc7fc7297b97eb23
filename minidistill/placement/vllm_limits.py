"""What vLLM cannot serve, as far as the configuration and the model's tell. Imports no vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.auto import is_multimodal, matches, skeleton
from minidistill.placement.machine import Machine

EMBEDDED = 'use inference.engine = "embedded"'
IN_MULTIMODAL_FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text")
"""Types of language models that vLLM implements together with multimodal ones."""


def model_obstacle(model_config: Any, machine: Machine) -> UserError | None:
    """Why vLLM cannot run this model on this machine; None if nothing is known to be in the way.

    What shows only in vLLM's process is found when an engine starts: see `VllmEngine.verify`.
    """
    multimodal = is_multimodal(model_config) or model_config.model_type in IN_MULTIMODAL_FAMILIES
    if not multimodal or machine.torchvision:
        return None
    return UserError(
        f"vLLM needs the package torchvision for {model_config.model_type} models, for text alone "
        "too, and it is not installed",
        where="inference.engine",
        fix=f"install the torchvision that belongs to the installed torch, or {EMBEDDED}",
        exit_code=EXIT_ENVIRONMENT,
    )


def adapter_obstacle(config: Config, model_config: Any) -> UserError | None:
    """Why vLLM cannot serve what is trained; None if nothing is known to be in the way.

    4-bit models and DoRA are refused by the configuration's checks if vLLM is asked for.
    """
    lora = config.trainer.model.lora
    if config.model.quantization is not None:
        what = "vLLM would run other weights than the 4-bit ones that are trained"
        return UserError(what, "model.quantization", EMBEDDED)
    if lora and lora.use_dora:
        what = "vLLM cannot serve a DoRA adapter"
        return UserError(what, "trainer.model.lora.use_dora", EMBEDDED)
    if not lora or lora.target_modules == "all-linear":
        return None
    modules = skeleton(model_config).named_modules()
    embeddings = [name for name, module in modules if isinstance(module, nn.Embedding)]
    for target in lora.target_modules:
        if any(matches(name, target) for name in embeddings):
            return UserError(
                f"an adapter on the embedding {target} cannot be sent to vLLM",
                where="trainer.model.lora.target_modules",
                fix=f"leave {target} out, or {EMBEDDED}",
            )
    return None
