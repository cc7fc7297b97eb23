"""The resident model: one base with a LoRA adapter, student with it, frozen teacher without.

Shapes: `_B` sequences, `_L` length, `_N` completion tokens, `_H` hidden, `_V` vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidistill.config import Config
from minidistill.devices import pick_dtype
from minidistill.errors import UserError
from minidistill.models import resolve

STUDENT = "default"  # peft's own name for a single adapter, so that a saved one is plain PEFT
EMA = "ema"


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer. Raises UserError where there is none to load."""
    with _readable_errors(config.model.name):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(resolve(config.model.name), **_hub_arguments(config))


def load_model_config(config: Config) -> Any:
    """The model's configuration alone, without its weights."""
    with _readable_errors(config.model.name):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(resolve(config.model.name), **_hub_arguments(config))


def _hub_arguments(config: Config) -> dict[str, Any]:
    return {
        "revision": config.model.revision or "main",
        "trust_remote_code": config.model.trust_remote_code,
    }


@contextlib.contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}",
            where="model.name",
            fix="name a built-in model (tiny-sokoban), a local folder in Hugging Face layout, "
            "or a hub id that this machine can reach",
        ) from error


@dataclass(slots=True)
class Policy:
    """The model with its adapter. `model` is peft's wrapper; `eos_ids` end a completion."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    device: torch.device

    @property
    def config(self) -> Any:
        return self.model.get_base_model().config

    @property
    def body(self) -> nn.Module:
        """The transformer without its LM head; returns the final (normed) hidden states."""
        return self.model.get_base_model().base_model

    @property
    def head_VH(self) -> Tensor:
        """The LM head's weight, frozen."""
        return self.model.get_base_model().get_output_embeddings().weight

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name, in a fixed order."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def pad_id(self) -> int:
        id = self.tokenizer.pad_token_id
        return id if id is not None else min(self.eos_ids)

    @property
    def dtype(self) -> torch.dtype:
        return self.head_VH.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.head_VH)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Dropout and activation checkpointing off."""
        training = self.model.training
        if not training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def role(self, adapter: str | None) -> Iterator[None]:
        """Run as the student (`STUDENT`), another adapter, or the bare base (None)."""
        if adapter == STUDENT:
            yield
        elif adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.base_model.set_adapter(adapter, inference_mode=True)
            try:
                yield
            finally:
                self.model.base_model.set_adapter(STUDENT)

    def add_ema(self) -> None:
        """A second adapter, equal to the student's now, for an averaged teacher."""
        self.model.add_adapter(EMA, self.model.peft_config[STUDENT])
        self.model.base_model.set_adapter(STUDENT)
        self.update_ema(0.0)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← decay * ema + (1 - decay) * student."""
        named = dict(self.model.named_parameters())
        for name, parameter in self.parameters:
            named[name.replace(f".{STUDENT}.", f".{EMA}.")].lerp_(parameter, 1 - decay)


def load_policy(config: Config, tokenizer: Any, device: torch.device) -> Policy:
    """The base in its dtype on `device`, frozen, with a fresh adapter in fp32 (B = 0).

    The adapter's start depends on `config.seed` alone.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    attention = {} if config.model.attn == "auto" else {"attn_implementation": config.model.attn}
    with _readable_errors(config.model.name):
        base = AutoModelForCausalLM.from_pretrained(
            resolve(config.model.name),
            dtype=pick_dtype(config, device),
            **attention,
            **_hub_arguments(config),
        )
    base.to(device)  # type: ignore[arg-type]
    if (ac := config.trainer.model.ac) is not None:
        _checkpoint_activations(base, ac.freq)
    lora = config.trainer.model.lora
    torch.manual_seed(config.seed)
    try:
        model = get_peft_model(
            base,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes fractions
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=True,
        )
    except ValueError as error:
        raise UserError(
            f"no adapter can be put on this model: {str(error).splitlines()[0]}",
            where="trainer.model.lora.target_modules",
            fix='use "all-linear" or names of linear layers that the model has',
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # dropout and checkpointing ask for training mode; without them one mode serves all
    model.train(lora.dropout > 0 or ac is not None)
    policy = Policy(model, tokenizer, _end_ids(base, tokenizer), device)
    if policy.head_VH.requires_grad:
        raise UserError(
            "the LM head would be trained",
            where="trainer.model.lora.target_modules",
            fix="leave the output embedding out: the loss needs one head for student and teacher",
        )
    return policy


def _checkpoint_activations(base: nn.Module, freq: int) -> None:
    """Recompute every freq-th decoder layer in backward."""
    base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = [m for m in base.modules() if getattr(m, "gradient_checkpointing", None) is True]
    layers = [m for m in layers if m is not getattr(base, "base_model", None)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % freq == 0  # type: ignore[assignment]


def _end_ids(base: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a completion, from the generation config and the tokenizer."""
    configured = base.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    found = frozenset(id for id in [*ids, tokenizer.eos_token_id] if id is not None)
    if not found:
        raise UserError(
            "the model names no end-of-sequence token",
            where="model.name",
            fix="set eos_token_id in its generation_config.json",
        )
    return found
