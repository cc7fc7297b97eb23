"""Which attention the trainer runs, and whether its sequences are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.machine import Machine

VARLEN = "varlen"
FLASH = "flash_attention_2"
KNOWN_TYPES = frozenset(
    ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "gemma")
)
"""Model types that attend causally and do nothing else. Tests compare their packed passes with
padded ones."""


class Layout(Enum):
    """How the sequences of a pass are laid out."""

    PADDED = "padded"
    """A row each."""
    PACKED = "packed"
    """In one row; a mask separates them."""
    SHARED = "shared"
    """In one row that has each prompt once."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How the trainer's passes attend, and why."""

    implementation: str | None = None
    """A name of transformers, or `varlen`; None leaves the choice to transformers."""
    packed: bool = False
    """The sequences of a training pass are in one row, without padding."""
    reason: str = ""

    @property
    def shares_prompts(self) -> bool:
        """Passes on whole sequences compute each prompt once."""
        return self.packed and self.implementation in (VARLEN, FLASH)

    @property
    def layout(self) -> Layout:
        """Of a training pass."""
        return Layout.PACKED if self.packed and not self.shares_prompts else self.prefix_layout

    @property
    def prefix_layout(self) -> Layout:
        """Of a pass that may follow a cached prefix: a mask cannot give each sequence its own."""
        return Layout.SHARED if self.shares_prompts else Layout.PADDED

    @property
    def text(self) -> str:
        """For the header."""
        name = self.implementation or "sdpa"
        layout = {
            Layout.PADDED: "sequences are padded",
            Layout.PACKED: "sequences are packed",
            Layout.SHARED: "sequences are packed, prompts computed once",
        }[self.layout]
        return f"{name}, {layout}: {self.reason}"


TRANSFORMERS_CHOICE = Attention()
"""Padded sequences, with the attention that transformers chooses for the model."""


def place_attention(
    config: Config, model_configs: Sequence[Any], machine: Machine, dtype: str, max_length: int
) -> Attention:
    """Choose the attention of the trainer's models. `max_length` bounds their sequences.

    Raises UserError: exit code 3 for a missing package or GPU, 2 for settings that contradict each
    other or the model.
    """
    asked, packing = config.model.attn, config.trainer.packing
    obstacles = (_obstacle(model, max_length) for model in model_configs)
    obstacle = next((text for text in obstacles if text), "")
    if asked == VARLEN:
        _check_varlen(packing, obstacle)
        return Attention(VARLEN, True, "model.attn")
    if asked == FLASH:
        _check_flash(machine, dtype)
        if packing == "auto" and obstacle:
            return Attention(FLASH, False, obstacle)
        return Attention(FLASH, packing is not False, "model.attn")
    if asked == "auto" and (capped := list(filter(_caps_scores, model_configs))):
        kind = capped[0].get_text_config().model_type
        why = f"{kind} models cap their attention scores, which SDPA leaves out"
        return Attention("eager", packing is True, why)
    if asked == "auto":
        if packing is False:
            return Attention(reason="trainer.packing")
        if obstacle:
            return Attention(None, packing is True, obstacle)
        return Attention(VARLEN, True, f"{_types(model_configs)} attend causally to all tokens")
    return Attention(asked, packing is True, "model.attn")


def _obstacle(model_config: Any, max_length: int) -> str:
    """Why a model cannot attend to packed sequences without a mask; empty if it can."""
    text = model_config.get_text_config()
    if text.model_type not in KNOWN_TYPES:
        return f"{text.model_type} models are not known to run packed without a mask"
    layers, window = getattr(text, "layer_types", None) or (), getattr(text, "sliding_window", None)
    if set(layers) - {"full_attention", "sliding_attention"}:
        return "some of its layers do not attend to all tokens"
    # Qwen's window is that of the layers that slide, Mistral's and Phi's that of all
    by_layer = layers and text.model_type.startswith("qwen")
    slides = "sliding_attention" in layers if by_layer else window is not None
    if slides and (window or 0) < max_length:
        return f"the model attends to a window of {window} tokens"
    if _caps_scores(model_config):
        return "the model caps its attention scores"
    return ""


def _caps_scores(model_config: Any) -> bool:
    return bool(getattr(model_config.get_text_config(), "attn_logit_softcapping", None))


def _types(model_configs: Sequence[Any]) -> str:
    kinds = dict.fromkeys(model.get_text_config().model_type for model in model_configs)
    return f"{' and '.join(kinds)} models"


def _check_varlen(packing: bool | str, obstacle: str) -> None:
    if packing is False:
        raise UserError(
            'model.attn = "varlen" packs sequences, and trainer.packing = false pads them',
            where="model.attn, trainer.packing",
            fix="leave one of them out",
        )
    if obstacle:
        raise UserError(
            f'model.attn = "varlen" does not fit this model: {obstacle}',
            where="model.attn",
            fix='use model.attn = "sdpa"',
        )


def _check_flash(machine: Machine, dtype: str) -> None:
    fix = 'use model.attn = "auto", which needs no package'
    if not machine.gpus:
        raise UserError(
            "flash_attention_2 runs on GPUs only, and there is none",
            where="model.attn",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        )
    if not machine.flash_attn:
        raise UserError(
            "flash_attention_2 needs the package flash-attn, which is not installed",
            where="model.attn",
            fix=f"install flash-attn, or {fix}",
            exit_code=EXIT_ENVIRONMENT,
        )
    if dtype == "float32":
        raise UserError(
            "flash_attention_2 needs 16-bit weights, and these are float32",
            where="model.attn, model.dtype",
            fix=f'use model.dtype = "bfloat16", or {fix}',
        )
