"""Bytes that the trainer and the engines need, part by part, from a model's sizes.

What the backward pass keeps of a layer is spelt out for the dense decoder of Llama and Qwen as
transformers and peft run it; tests measure it. Widths a token: H hidden, I intermediate, Q queries,
K keys, L the longest sequence, w bytes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minidistill.config import Config
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
"""Bytes by what they hold."""
# Of a process on a GPU: CUDA's context, its libraries' workspaces. An assumption, not measured.
CONTEXT = 1 << 30
ENGINE_TOKENS = 8192  # that vLLM reads in one pass on a GPU


@dataclass(frozen=True, slots=True)
class Load:
    """What a trainer's process is given to work on."""

    tokens: int
    """Padded tokens of a micro-batch."""
    longest: int
    """Tokens of its longest sequence."""
    completions: int
    """Its completion tokens: what reaches the LM head."""


def worst_load(config: Config, ranks: int) -> Load:
    """The largest micro-batch that a step can come to."""
    longest, orchestrator = config.seq_len, config.orchestrator
    own = orchestrator.batch_size // ranks * longest
    tokens = min(max(config.trainer.micro_batch_tokens, longest), own)
    sequences = tokens // longest
    return Load(tokens, longest, sequences * orchestrator.sampling.max_tokens)


def trainer_memory(
    config: Config,
    shape: ModelShape,
    teacher_placement: TeacherPlacement,
    load: Load,
    device: torch.device,
    itemsize: int,
    sharded: int = 1,
    teacher_shape: ModelShape | None = None,
) -> MemoryBreakdown:
    """Bytes at the trainer's peak, in the backward pass.

    `itemsize` is the base's, `sharded` over how many ranks its weights (and under full fine-tuning
    gradients and optimizer) are split; a layer, and the embedding, are then gathered for use.
    `teacher_shape` is that of a teacher that is another model.
    """
    lora, teacher = config.trainer.model.lora, config.orchestrator.teacher_model
    weights, in_trainer = shape.parameters * itemsize, teacher_placement.scorer == "trainer"
    trained = shape.adapter(lora.rank, lora.target_modules) if lora else shape.parameters
    parts: MemoryBreakdown = {"weights": weights // sharded}
    if sharded > 1:
        whole = 2 * shape.a_layer + shape.embedding + shape.head
        parts["gathered layers"] = whole * itemsize
    if lora:
        parts["adapter"] = 4 * trained * (2 if teacher.update == "ema" else 1)
        parts["gradients"], parts["optimizer"] = 4 * trained, 8 * trained
    else:
        if teacher.update == "ema" or (teacher.update == "frozen" and in_trainer):
            parts["reference copy"] = weights // sharded
        master = 4 if itemsize < 4 else 0
        parts["gradients"] = weights // sharded
        parts["optimizer"] = (8 + master) * trained // sharded
    if teacher_shape is not None and in_trainer:
        parts["reference copy"] = teacher_shape.parameters * itemsize // sharded
    parts["activations"] = activations(config, shape, load, itemsize)
    parts["head chunk"] = head_chunk(config, shape, teacher_placement, load, device, itemsize)
    if in_trainer:
        parts["teacher's hidden states"] = load.completions * shape.hidden * itemsize
    return parts


def activations(config: Config, shape: ModelShape, load: Load, itemsize: int) -> int:
    """Bytes that the backward pass of a micro-batch keeps, and works with.

    Checkpointed layers keep their input alone, and one of them at a time is computed again.
    """
    kept = layer_activations(config, shape, load, itemsize)
    layers, inputs = shape.layers, shape.hidden * itemsize
    total = kept * layers
    if (ac := config.trainer.model.ac) is not None:
        checkpointed = -(-layers // ac.freq)
        whole = layers - checkpointed
        # those after the last checkpointed one are done with when it is computed again
        after = layers - 1 - (checkpointed - 1) * ac.freq
        total = kept * max(whole, whole - after + 1) + inputs * checkpointed
    # the last norm's input and output, and the gradients that stand beside what is kept
    ends = shape.hidden * (4 + itemsize)
    working = 4 * (2 * shape.intermediate + 2 * shape.hidden)
    return load.tokens * (total + ends + working)


def layer_activations(config: Config, shape: ModelShape, load: Load, itemsize: int) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    norms        2 · 4H in fp32, and w · 2H of outputs that fp32 adapters or trained weights read
    q, k norm    4 (Q + K) where there are any
    attention    w (Q + 2 keys and values + Q), keys and values widened to Q under a mask; 4 a head
    mask         w L with padding, w · tokens with packing, none with flash attention
    MLP          w · 3I: gate, its activation, up
    adapters     4 · inputs + 4 · rank for each layer that has one, in fp32 whatever the base
    """
    w, lora, attn = itemsize, config.trainer.model.lora, config.model.attn
    h, i, q, k = shape.hidden, shape.intermediate, shape.attention, shape.keys
    flash = attn == "flash_attention_2"
    total = 2 * 4 * h + 3 * w * i + w * (2 * q + 2 * (k if flash else q)) + 4 * shape.heads + 8
    width = load.tokens if config.trainer.packing else load.longest
    if attn == "eager":
        total += shape.heads * load.longest * (4 if w == 4 else 4 + w)
    elif not flash:
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
    # in fp32 the adapters read what is there, each input once
    blocks = {(x.name.rpartition(".")[0], x.inputs) for x in adapted}
    attended = {name for name, _ in blocks if name.endswith("attn")}
    distinct = sum(inputs for name, inputs in blocks if name not in attended)
    return total + 4 * (distinct + h * len(attended)) // shape.layers


def head_chunk(
    config: Config,
    shape: ModelShape,
    teacher_placement: TeacherPlacement,
    load: Load,
    device: torch.device,
    itemsize: int,
) -> int:
    """Bytes of a chunk of logits in fp32, of the teacher's or the gradient's, and d hidden."""
    size = chunk_tokens(load.completions, shape.vocab, 0, device)
    narrow = device.type == "cuda" and itemsize < 4
    second = itemsize if narrow else 4 * (teacher_placement.scorer == "trainer")
    return size * shape.vocab * (4 + second) + 2 * load.completions * shape.hidden * itemsize


def sync_buffer(config: Config, shape: ModelShape, itemsize: int) -> int:
    """Bytes set aside to hand weights to the engines: the adapter, or a chunk of all weights."""
    lora = config.trainer.model.lora
    if lora:
        return shape.adapter(lora.rank, lora.target_modules) * itemsize
    return min(SYNC_CHUNK_BYTES, shape.parameters * itemsize)


def engine_memory(
    config: Config, shape: ModelShape, itemsize: int, tp: int, budget: int, adapters: int
) -> MemoryBreakdown:
    """Parts of what one of an engine's GPUs may take; the keys and values get what is left.

    `budget` is that GPU's bytes, `adapters` how many are held. A negative rest means that the
    engine cannot start.
    """
    lora = config.trainer.model.lora
    held = 0
    if lora and adapters:
        rank = min(rank for rank in LORA_RANKS if rank >= lora.rank)
        held = adapters * shape.adapter(rank, lora.target_modules) * itemsize
    reading = ENGINE_TOKENS * 2 * (shape.intermediate + shape.hidden) * itemsize
    logits = 2 * 4 * MAX_SEQUENCES * shape.vocab
    parts: MemoryBreakdown = {
        "weights": shape.parameters * itemsize // tp,
        "adapter slots": held // tp,
        "activations": (reading + logits) // tp,
        "CUDA context": CONTEXT,
    }
    return {**parts, "keys and values": budget - sum(parts.values())}


def cpu_engines(placement: Placement, shapes: Shapes, itemsize: int) -> MemoryBreakdown:
    """Bytes of the engines beside a trainer on a CPU, by "owner: part".

    Each replica has a copy of the weights, whatever its tp. Its working memory is not counted.
    """
    parts: MemoryBreakdown = {}
    for owner, engine, shape in (
        ("student", placement.student, shapes.student),
        ("teacher", placement.teacher_engine, shapes.teacher),
    ):
        if engine is not None and engine.kind.on_run_gpus:
            kv_bytes = kv_bytes_per_token(engine.model_config, itemsize)
            cache = cpu_cache_bytes(kv_bytes, placement.max_length)
            parts[f"{owner}: weights"] = engine.dp * shape.parameters * itemsize
            parts[f"{owner}: keys and values"] = engine.dp * cache
    return parts


def embedded_cache(placement: Placement, config: Config, itemsize: int) -> int:
    """Bytes of keys and values while the trainer's own model samples."""
    one_sequence = kv_bytes_per_token(placement.student.model_config, itemsize) * config.seq_len
    return max(
        one_sequence, min(EMBEDDED_CACHE_BYTES, one_sequence * config.orchestrator.batch_size)
    )
