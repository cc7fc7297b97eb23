"""A model with the shipped model's tokenizer and other weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from minidistill.models.registry import BUILT_IN


def scaled_copy(folder: Path, factor: float) -> Any:
    """Save the shipped model with all weights scaled to `folder`. Returns the model, in fp32."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(BUILT_IN["tiny-sokoban"], folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    model.save_pretrained(folder)
    return model
