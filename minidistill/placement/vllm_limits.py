"""What vLLM cannot serve, as far as the configuration and the model's tell. Imports no vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.models.auto import matches, skeleton

EMBEDDED = 'use inference.engine = "embedded"'


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
