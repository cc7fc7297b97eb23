"""A model's sizes, from its configuration. No weights are loaded or allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from minidistill.config.schema import LoraConfig
from minidistill.errors import UserError, blamed_on
from minidistill.models.auto import matches, skeleton, text_linears, text_parameters
from minidistill.models.hub import TEACHER_KEY
from minidistill.placement.limits import head_size
from minidistill.placement.placement import Models

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: itself, an 8-bit scale for 64 of them, and an fp32 scale for 256 scales."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the transformer's body that may take an adapter."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts of a dense decoder."""

    parameters: int
    text: int
    """Those that text reaches: all but a multimodal model's vision tower and its like. If every
    weight is trained, it is these."""
    embedding: int
    """Parameters of the input embedding."""
    head: int
    """Parameters of the LM head; 0 if it is tied to the input embedding."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    """Queries and keys are normalized before attention."""
    gated: bool
    """MLPs are down(silu(gate(x)) · up(x)), under these names."""
    linears: tuple[Linear, ...]
    """Of all layers."""
    embedding_layer: Linear
    """The input embedding, which may have an adapter too."""
    head_name: str

    @property
    def attention(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        return self.text - self.embedding - self.head

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer, on average."""
        return self.body // self.layers

    def adapted(self, targets: str | list[str]) -> tuple[Linear, ...]:
        """The layers that `targets` selects for an adapter. Names are matched as peft does."""
        if targets == "all-linear":
            return self.linears
        layers = (*self.linears, self.embedding_layer)
        return tuple(x for x in layers if any(matches(x.name, target) for target in targets))

    def adapter(self, lora: LoraConfig, rank: int | None = None) -> int:
        """Parameters of an adapter: rank × (inputs + outputs) on each of its layers, and with DoRA
        the outputs' norms. `rank` is given where every layer has room for that rank."""
        adapted = self.adapted(lora.target_modules)
        ranks = [module_rank(lora, x.name) if rank is None else rank for x in adapted]
        matrices = sum(
            rank * (x.inputs + x.outputs) for rank, x in zip(ranks, adapted, strict=True)
        )
        return matrices + (sum(x.outputs for x in adapted) if lora.use_dora else 0)

    def weight_bytes(self, itemsize: int, quantization: str | None = None) -> int:
        """Bytes of all weights. In 4 bit the linear layers take half a byte a weight, and a scale
        for each block, which is quantized too. The embedding, the head and the norms are not."""
        if quantization is None:
            return self.parameters * itemsize
        quantized = sum(x.inputs * x.outputs for x in self.linears)
        return int(quantized * NF4_BITS / 8) + (self.parameters - quantized) * itemsize


def module_rank(lora: LoraConfig, name: str) -> int:
    """The rank of a layer's adapter. Patterns are matched as peft does."""
    for pattern, rank in lora.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return lora.rank


def largest_rank(lora: LoraConfig) -> int:
    """The smallest rank that fits every layer's."""
    return max([lora.rank, *lora.rank_pattern.values()])


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of the student's and the teacher's model."""

    student: ModelShape
    teacher: ModelShape

    @classmethod
    def of(cls, models: Models) -> Shapes:
        student = read_shape(models.student)
        same = models.teacher is models.student
        with blamed_on(TEACHER_KEY):
            return cls(student, student if same else read_shape(models.teacher))


def read_shape(model_config: Any) -> ModelShape:
    """Build the model on torch's meta device and count it. Exact for any architecture.

    Raises UserError for a model without attention, or without layers.
    """
    from transformers.pytorch_utils import Conv1D

    model = skeleton(model_config)
    text = model_config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise UserError(
            f"{text.model_type} models have no attention, whose sizes the plan counts",
            where="model.name",
            fix="use a model with attention in some of its layers",
        )
    if not text.num_hidden_layers:
        raise UserError(
            "the model has no layers",
            where="model.name",
            fix="use the config.json that belongs to the model",
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(text, "tie_word_embeddings", False) or head.weight is embedding.weight
    linears = tuple(
        Linear(name, *((x.nx, x.nf) if isinstance(x, Conv1D) else (x.in_features, x.out_features)))
        for name, x in text_linears(model)
    )
    names = {id(module): name for name, module in model.named_modules()}
    heads = text.num_attention_heads
    hidden = text.hidden_size
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        text=sum(p.numel() for p in text_parameters(model)),
        embedding=embedding.weight.numel(),
        head=0 if tied else head.weight.numel(),
        layers=text.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_size(text),
        vocab=embedding.weight.shape[0],
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        gated=_is_gated(text, linears),
        linears=linears,
        embedding_layer=Linear(names[id(embedding)], *embedding.weight.shape),
        head_name=names[id(head)],
    )


def _is_gated(text: Any, linears: tuple[Linear, ...]) -> bool:
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    names = {x.name.rpartition(".")[2] for x in linears}
    return activation in ("silu", "swish") and names >= {"gate_proj", "up_proj", "down_proj"}
