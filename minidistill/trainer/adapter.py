"""The adapter that is trained: a new one, or one that starts from saved tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minidistill.config.adapter import KEY, TENSORS, adapter_folder
from minidistill.config.schema import LoraConfig
from minidistill.errors import UserError
from minidistill.models.auto import is_multimodal, outside_text, text_linears
from minidistill.trainer.policy import Weights

NAMED = 4  # tensors that an error names


def add_adapter(lora: LoraConfig, base: Any, dtype: torch.dtype, seed: int) -> Any:
    """peft's wrapper of `base` with an adapter that computes in `dtype`.

    A new adapter changes nothing (B = 0) and depends on `seed` only. With `lora.init` it has saved
    tensors. Raises UserError for layers that the model does not have, and for tensors that are not
    exactly those of the adapter.
    """
    import peft

    torch.manual_seed(seed)
    targets = lora.target_modules
    if targets == "all-linear" and is_multimodal(base.config):
        # else peft saves the names of the vision tower's layers too
        targets = sorted({name.rpartition(".")[2] for name, _ in text_linears(base)})
    try:
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions
                lora_dropout=lora.dropout,
                target_modules=targets,
                exclude_modules=outside_text(base) or None,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                rank_pattern=dict(lora.rank_pattern),
                task_type="CAUSAL_LM",
            ),
            # else the adapter gets the base's dtype, and peft casts neither inputs nor outputs
            autocast_adapter_dtype=dtype == torch.float32,
        )
    except ValueError as error:
        raise UserError(
            f"this model cannot have an adapter: {str(error).splitlines()[0]}",
            where="trainer.model.lora.target_modules",
            fix="name linear layers of the model that can have one, as peft's message says",
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype != dtype:  # peft makes those of 4-bit layers fp32
            parameter.data = parameter.data.to(dtype)
    if isinstance(base.get_output_embeddings(), peft.tuners.lora.LoraLayer):
        raise UserError(
            "the LM head would get an adapter: the loss needs one head for student and teacher",
            where="trainer.model.lora.target_modules",
            fix="leave the output embedding out",
        )
    _check_patterns(lora, model)
    if lora.init is not None:
        _load(lora.init, model)
    return model


def _check_patterns(lora: LoraConfig, model: Any) -> None:
    """Raise UserError for a rank that no layer has."""
    names = [n.partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n]
    for pattern in lora.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            raise UserError(
                f"trainer.model.lora.rank_pattern has {pattern!r}, which no adapted layer matches",
                where="trainer.model.lora.rank_pattern",
                fix=f"write the end of a module's name, such as {names[0].rpartition('.')[2]!r}",
            )


@torch.no_grad()
def _load(init: str, model: Any) -> None:
    """Give the adapter the tensors of a PEFT folder."""
    path = adapter_folder(init) / TENSORS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the adapter: {error}", where=str(path), fix="copy it again"
        ) from error
    expected = _by_saved_name(model)
    _check_names(saved, expected, str(path))
    for name, parameter in expected.items():
        if saved[name].shape != parameter.shape:
            raise UserError(
                f"the adapter's {name} has the shape {tuple(saved[name].shape)}, and the model "
                f"needs {tuple(parameter.shape)}",
                where=f"{KEY}, {path}",
                fix="use the model that the adapter was trained on",
            )
        if not bool(saved[name].isfinite().all()):
            raise UserError(
                f"the adapter's {name} has values that are not finite",
                where=f"{KEY}, {path}",
                fix="start from another checkpoint of it",
            )
        parameter.copy_(saved[name])


def _by_saved_name(model: Any) -> dict[str, Tensor]:
    """The adapter's parameters under their names in a PEFT file."""
    return {_saved_name(n): p for n, p in model.named_parameters() if ".lora_" in n}


def _saved_name(name: str) -> str:
    """`….lora_A.default.weight` as `….lora_A.weight`, and `….lora_embedding_A.default` without its
    end. DoRA's norms are saved without "weight" too."""
    start, _, end = name.rpartition(f".{Weights.STUDENT.value}")
    return start if start.endswith("lora_magnitude_vector") else start + end


def _check_names(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> None:
    for names, what in (
        (sorted(expected.keys() - saved.keys()), "lacks"),
        (sorted(saved.keys() - expected.keys()), "has tensors for which the model has no layer:"),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise UserError(
                f"the adapter {what} {', '.join(names[:NAMED])}{more}",
                where=f"{KEY}, {path}",
                fix="use the model that the adapter was trained on, and leave out settings that "
                "are taken from the adapter",
            )
