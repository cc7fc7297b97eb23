"""Estimates of the memory that engines need, by part, and of syncs to them."""

from __future__ import annotations

from minidistill.config import Config
from minidistill.placement.limits import (
    EMBEDDED_CACHE_BYTES,
    LORA_RANKS,
    MAX_SEQUENCES,
    PACKED_SHARE,
    SYNC_CHUNK_BYTES,
    cpu_cache_bytes,
    kv_bytes_per_token,
)
from minidistill.placement.memory import MemoryBreakdown
from minidistill.placement.model_shape import ModelShape, Shapes, largest_rank
from minidistill.placement.placement import Placement

# Each process on a GPU: CUDA's context and its libraries' workspaces. Assumed, not measured.
CONTEXT = 1 << 30
GRAPHS = 1 << 29
"""vLLM's CUDA graphs, which stay while it sleeps. Assumed, not measured."""
ENGINE_TOKENS = 8192  # that vLLM prefills in one pass on a GPU


def engine_memory(
    config: Config, shape: ModelShape, itemsize: int, tp: int, budget: int, adapters: int
) -> MemoryBreakdown:
    """Bytes on one of an engine's GPUs. The keys and values get what the other parts leave.

    `budget` is what the engine may take of that GPU, `adapters` how many it holds. If nothing is
    left for keys and values, their size is negative and the engine cannot start. The process's CUDA
    context exists before vLLM looks at the GPU's memory: it is outside the budget.
    """
    lora = config.trainer.model.lora
    slots = 0
    if lora and adapters:
        rank = min(rank for rank in LORA_RANKS if rank >= largest_rank(lora))
        slots = adapters * shape.adapter(lora, rank) * itemsize
    prefill = ENGINE_TOKENS * 2 * (shape.intermediate + shape.hidden) * itemsize
    logits = 2 * 4 * MAX_SEQUENCES * shape.vocab
    parts: MemoryBreakdown = {
        "weights": shape.parameters * itemsize // tp,
        "adapter slots": slots // tp,
        "activations": (prefill + logits) // tp,
        "CUDA graphs": GRAPHS,
    }
    return {**parts, "keys and values": budget - sum(parts.values())}


def sync_buffer(config: Config, shape: ModelShape, itemsize: int) -> int:
    """Bytes of the buffer for a sync: the adapter, or a chunk of all weights.

    A tensor that is larger than a chunk is sent alone, and the embedding is the largest.
    """
    lora = config.trainer.model.lora
    if lora:
        return shape.adapter(lora) * itemsize
    return max(min(SYNC_CHUNK_BYTES, shape.parameters * itemsize), shape.embedding * itemsize)


def received_memory(config: Config, shape: ModelShape, itemsize: int, tp: int) -> MemoryBreakdown:
    """Bytes that a sync takes in the engine's process, outside its budget.

    vLLM copies what it receives. Of a whole model it also builds each layer again, before it copies
    it over the old one.
    """
    received = {"received weights": sync_buffer(config, shape, itemsize)}
    if config.trainer.model.lora:
        return received
    return received | {"rebuilt layer": shape.embedding * itemsize // tp}


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


def embedded_cache(
    placement: Placement, config: Config, itemsize: int, room: int | None = None
) -> int:
    """Bytes of keys and values while the trainer's own model samples, at most.

    On a GPU they take up to `room`: half of what everything else leaves.
    """
    kv_bytes = kv_bytes_per_token(placement.student.model_config, itemsize)
    one_sequence = kv_bytes * placement.max_length
    limit = EMBEDDED_CACHE_BYTES if room is None else room
    return max(one_sequence, min(limit, one_sequence * config.orchestrator.batch_size))


def packed_copy(shape: ModelShape, itemsize: int, memory: int) -> int:
    """Bytes of the packed weights that the trainer's model samples with on a CPU.

    0 if they are not in fp32, or would take too much of the `memory`.
    """
    linears = sum(linear.inputs * linear.outputs for linear in shape.linears)
    size = itemsize * (linears + shape.vocab * shape.hidden)
    return size if itemsize == 4 and size <= PACKED_SHARE * memory else 0
