"""Estimates of the memory that the trainer and the engines need, by part, from a model's sizes.

The activations are those of a dense decoder like Llama's and Qwen's, as transformers and peft run
it; tests compare them with a measured step. Widths per token: H hidden, I intermediate, Q queries,
K keys. L is the longest sequence, w the bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minidistill.config import Config
from minidistill.placement.attention import FLASH, TRANSFORMERS_CHOICE, Attention
from minidistill.placement.limits import (
    EMBEDDED_CACHE_BYTES,
    LORA_RANKS,
    MAX_SEQUENCES,
    SYNC_CHUNK_BYTES,
    cpu_cache_bytes,
    kv_bytes_per_token,
)
from minidistill.placement.model_shape import ModelShape, Shapes
from minidistill.placement.placement import Placement
from minidistill.placement.teacher import TeacherPlacement
from minidistill_kernels.distill import chunk_tokens

MemoryBreakdown = dict[str, int]
"""Bytes by the name of a part."""
# Each process on a GPU: CUDA's context and its libraries' workspaces. Assumed, not measured.
CONTEXT = 1 << 30
ENGINE_TOKENS = 8192  # that vLLM prefills in one pass on a GPU


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """How much of each kind of token is in a micro-batch."""

    tokens: int
    """All of them, padding included."""
    longest: int
    """Tokens of the longest sequence."""
    completions: int
    """Completion tokens. Only these reach the LM head."""


def largest_micro_batch(config: Config, ranks: int) -> MicroBatchSize:
    """The largest micro-batch that a step can have: every sequence has `seq_len` tokens."""
    longest, orchestrator = config.seq_len, config.orchestrator
    rank_tokens = orchestrator.batch_size // ranks * longest
    tokens = min(max(config.trainer.micro_batch_tokens, longest), rank_tokens)
    sequences = tokens // longest
    return MicroBatchSize(tokens, longest, sequences * orchestrator.sampling.max_tokens)


def trainer_memory(
    config: Config,
    shape: ModelShape,
    teacher_placement: TeacherPlacement,
    size: MicroBatchSize,
    device: torch.device,
    itemsize: int,
    shards: int = 1,
    teacher_shape: ModelShape | None = None,
    attention: Attention = TRANSFORMERS_CHOICE,
) -> MemoryBreakdown:
    """Bytes on one rank at the trainer's peak, which is in the backward pass.

    `itemsize` is that of a base weight. The weights, and under full fine-tuning the gradients and
    the optimizer's state, are split into `shards`; with more than one, layers and the embedding are
    gathered for use. `teacher_shape` is given if the teacher is another model.
    """
    lora, teacher = config.trainer.model.lora, config.orchestrator.teacher_model
    weights, in_trainer = shape.parameters * itemsize, teacher_placement.scorer == "trainer"
    trained = shape.adapter(lora.rank, lora.target_modules) if lora else shape.parameters
    parts: MemoryBreakdown = {"weights": weights // shards}
    if shards > 1:
        unsharded = 2 * shape.layer_parameters + shape.embedding + shape.head
        parts["gathered layers"] = unsharded * itemsize
    if lora:
        parts["adapter"] = 4 * trained * (2 if teacher.update == "ema" else 1)
        parts["gradients"], parts["optimizer"] = 4 * trained, 8 * trained
    else:
        if teacher.update == "ema" or (teacher.update == "frozen" and in_trainer):
            parts["reference copy"] = weights // shards
        master = 4 if itemsize < 4 else 0
        parts["gradients"] = weights // shards
        parts["optimizer"] = (8 + master) * trained // shards
    if teacher_shape is not None and in_trainer:
        parts["reference copy"] = teacher_shape.parameters * itemsize // shards
    parts["activations"] = activations(config, shape, size, itemsize, attention)
    parts["head chunk"] = head_chunk(config, shape, teacher_placement, size, device, itemsize)
    if in_trainer:
        parts["teacher's hidden states"] = size.completions * shape.hidden * itemsize
    return parts


def activations(
    config: Config, shape: ModelShape, size: MicroBatchSize, itemsize: int, attention: Attention
) -> int:
    """Bytes that are saved for a micro-batch's backward pass, and those it works with.

    A checkpointed layer saves only its input. One such layer at a time is recomputed.
    """
    saved = layer_activations(config, shape, size, itemsize, attention)
    layers, inputs = shape.layers, shape.hidden * itemsize
    total = saved * layers
    if (ac := config.trainer.model.ac) is not None:
        checkpointed = -(-layers // ac.freq)
        others = layers - checkpointed
        # the layers after the last checkpointed one are done when that one is recomputed
        after = layers - 1 - (checkpointed - 1) * ac.freq
        total = saved * max(others, others - after + 1) + inputs * checkpointed
    # the last norm's input and output, and the gradients in flight
    ends = shape.hidden * (4 + itemsize)
    working = 4 * (2 * shape.intermediate + 2 * shape.hidden)
    return size.tokens * (total + ends + working)


def layer_activations(
    config: Config, shape: ModelShape, size: MicroBatchSize, itemsize: int, attention: Attention
) -> int:
    """Bytes per token that one layer saves for its backward pass.

    norms        2 · 4H in fp32, and w · 2H of outputs that fp32 adapters or trained weights read
    q, k norm    4 (Q + K) if the model has them
    attention    w (Q + 2 keys and values + Q), keys and values widened to Q under a mask; 4 a head
    mask         w L with padding, w · tokens if packing needs a mask, none without one
    MLP          w · 3I: gate, its activation, up
    adapters     4 · inputs + 4 · rank for each adapted layer, in fp32 whatever the base's dtype
    """
    w, lora = itemsize, config.trainer.model.lora
    h, i, q, k = shape.hidden, shape.intermediate, shape.attention, shape.keys
    unmasked = attention.unpadded or attention.implementation == FLASH
    total = 2 * 4 * h + 3 * w * i + w * (2 * q + 2 * (k if unmasked else q)) + 4 * shape.heads + 8
    width = size.tokens if attention.packed else size.longest
    if attention.implementation == "eager":
        total += shape.heads * size.longest * (4 if w == 4 else 4 + w)
    elif not unmasked:
        total += w * width
    if shape.qk_norm:
        total += 4 * (q + k + shape.heads + shape.kv_heads)
    if lora is False:
        # outputs of norms, before and after their weight, and what the down projection reads
        total += 2 * 2 * w * h + w * i
        return total + (w * (q + k) if shape.qk_norm else 0)
    adapted = shape.adapted(lora.target_modules)
    total += 4 * lora.rank * len(adapted) // shape.layers
    if w < 4:
        return total + 4 * sum(x.inputs for x in adapted) // shape.layers
    # with an fp32 base, adapters save no copies: each input counts once
    blocks = {(x.name.rpartition(".")[0], x.inputs) for x in adapted}
    attended = {name for name, _ in blocks if name.endswith("attn")}
    distinct = sum(inputs for name, inputs in blocks if name not in attended)
    return total + 4 * (distinct + h * len(attended)) // shape.layers


def head_chunk(
    config: Config,
    shape: ModelShape,
    teacher_placement: TeacherPlacement,
    size: MicroBatchSize,
    device: torch.device,
    itemsize: int,
) -> int:
    """Bytes of a chunk of the student's logits in fp32, of the teacher's logits or the gradient's,
    and of the hidden states and their gradient."""
    chunk = chunk_tokens(size.completions, shape.vocab, 0, device)
    narrow = device.type == "cuda" and itemsize < 4
    second = itemsize if narrow else 4 * (teacher_placement.scorer == "trainer")
    return chunk * shape.vocab * (4 + second) + 2 * size.completions * shape.hidden * itemsize


def sync_buffer(config: Config, shape: ModelShape, itemsize: int) -> int:
    """Bytes of the buffer for a sync: the adapter, or a chunk of all weights."""
    lora = config.trainer.model.lora
    if lora:
        return shape.adapter(lora.rank, lora.target_modules) * itemsize
    return min(SYNC_CHUNK_BYTES, shape.parameters * itemsize)


def engine_memory(
    config: Config, shape: ModelShape, itemsize: int, tp: int, budget: int, adapters: int
) -> MemoryBreakdown:
    """Bytes on one of an engine's GPUs. The keys and values get what the other parts leave.

    `budget` is what the engine may take of that GPU, `adapters` how many it holds. If nothing is
    left for keys and values, their size is negative and the engine cannot start.
    """
    lora = config.trainer.model.lora
    slots = 0
    if lora and adapters:
        rank = min(rank for rank in LORA_RANKS if rank >= lora.rank)
        slots = adapters * shape.adapter(rank, lora.target_modules) * itemsize
    prefill = ENGINE_TOKENS * 2 * (shape.intermediate + shape.hidden) * itemsize
    logits = 2 * 4 * MAX_SEQUENCES * shape.vocab
    parts: MemoryBreakdown = {
        "weights": shape.parameters * itemsize // tp,
        "adapter slots": slots // tp,
        "activations": (prefill + logits) // tp,
        "CUDA context": CONTEXT,
    }
    return {**parts, "keys and values": budget - sum(parts.values())}


def cpu_engines(placement: Placement, shapes: Shapes, itemsize: int) -> MemoryBreakdown:
    """Bytes of the engines next to a trainer on a CPU, by "owner: part".

    Each replica has a copy of the weights, whatever its tp. Activations are not counted.
    """
    parts: MemoryBreakdown = {}
    for owner, engine, shape in (
        ("student", placement.student, shapes.student),
        ("teacher", placement.teacher_engine, shapes.teacher),
    ):
        if engine is not None and engine.kind.on_run_gpus:
            kv_bytes = kv_bytes_per_token(engine.model_config, itemsize)
            cache = cpu_cache_bytes(kv_bytes, engine.max_length)
            parts[f"{owner}: weights"] = engine.dp * shape.parameters * itemsize
            parts[f"{owner}: keys and values"] = engine.dp * cache
    return parts


def embedded_cache(placement: Placement, config: Config, itemsize: int) -> int:
    """Bytes of keys and values while the trainer's own model samples, at most."""
    one_sequence = kv_bytes_per_token(placement.student.model_config, itemsize) * config.seq_len
    return max(
        one_sequence, min(EMBEDDED_CACHE_BYTES, one_sequence * config.orchestrator.batch_size)
    )
