"""The settings of memory that a configuration leaves open: how much each engine takes of a GPU, the
trainer's micro-batch, and whether it recomputes activations.

Engines that share a GPU with the trainer sleep while it works. So their share does not depend on
the micro-batch, and the micro-batch does not depend on their share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from minidistill.config import Config
from minidistill.config.schema import AcConfig
from minidistill.placement.devices import FILL, Device, EngineOnGpus, Memory
from minidistill.placement.gpus import MOST_OF_A_GPU
from minidistill.placement.limits import CPU_MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.memory import largest_group
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Choice, Placement

STEPS = 100
"""Shares of a GPU are rounded down to one of these parts."""
EFFICIENT_TOKENS = 4096
"""Smaller micro-batches leave a GPU idle: recomputing activations costs less."""
MARGIN = 0.95
"""Of what a plan may fill: activations are estimated, and a smaller micro-batch costs little."""
TRAINER_PHASES = ("training", "evaluating")
SET = "set in the configuration"


def choose(config: Config, placement: Placement, shapes: Shapes, machine: Machine) -> Placement:
    """The placement with settings of memory that fit, or that need the least if none do.

    What the configuration sets is kept.
    """
    placement = _choose_shares(config, placement, shapes, machine)
    return _choose_micro_batch(config, placement, shapes, machine)


# -- the engines' shares -----------------------------------------------------------------------


def _choose_shares(
    config: Config, placement: Placement, shapes: Shapes, machine: Machine
) -> Placement:
    memory = Memory(config, placement, shapes, machine)
    for engine in memory.engines:
        share, reason = engine.placement.memory_share, SET
        if getattr(config, engine.table).gpu_memory_utilization == "auto":
            share, reason = _share(engine, memory)
        chosen = replace(engine.placement, memory_share=share)
        text = f"{share:g} of {_gpus(engine.gpus)}"
        if len(memory.engines) > 1:
            text = f"{text} for the {engine.owner}"
        choice = Choice(f"{engine.table}.gpu_memory_utilization", text, reason)
        placement = replace(placement, choices=(*placement.choices, choice))
        if engine.owner == "teacher":
            placement = replace(placement, teacher_engine=chosen)
            continue
        reason = "the longest sequence"
        if chosen.max_length > placement.max_length:
            reason += ", and one token for scoring"
        length = Choice("max_model_len", f"{chosen.max_length:,} tokens", reason)
        choices = (*placement.choices, length)
        placement = replace(placement, student=chosen, choices=choices)
    return placement


def _share(engine: EngineOnGpus, memory: Memory) -> tuple[float, str]:
    """What an engine may take of each of its GPUs, and why."""
    shares = {gpu: _share_of(gpu, engine, memory) for gpu in engine.gpus}
    gpu = min(shares, key=lambda gpu: shares[gpu])
    share = shares[gpu]
    if gpu in memory.placement.trainer_gpus:
        return share, f"what the trainer leaves on GPU {gpu}"
    neighbors = [other for other in memory.engines if other is not engine and gpu in other.gpus]
    if neighbors:
        return share, f"the {neighbors[0].owner}'s engine has the rest"
    return share, "it has its GPUs to itself" if share == MOST_OF_A_GPU else "syncs need the rest"


def _share_of(gpu: int, engine: EngineOnGpus, memory: Memory) -> float:
    """What an engine may take of a GPU. Two engines have what they need, and half of the rest."""
    left = int(FILL * memory.bytes) - memory.beside_engines(gpu)
    most = min(MOST_OF_A_GPU, left / memory.bytes)
    neighbor = next((e for e in memory.engines if e is not engine and gpu in e.gpus), None)
    if neighbor is not None:
        setting = getattr(memory.config, neighbor.table).gpu_memory_utilization
        if setting == "auto":
            needs = [_least(e) / memory.bytes for e in (engine, neighbor)]
            most = needs[0] + max(0.0, most - sum(needs)) / 2
        else:
            most -= neighbor.placement.memory_share
    return max(0, int(STEPS * most + 1e-9)) / STEPS


def _least(engine: EngineOnGpus) -> int:
    """Bytes with which an engine holds one sequence."""
    fixed = sum(size for name, size in engine.budget.items() if name != "keys and values")
    return fixed + engine.sequence_bytes


def _gpus(gpus: tuple[int, ...]) -> str:
    return f"GPU {', '.join(map(str, gpus))}"


# -- the micro-batch ---------------------------------------------------------------------------


def _choose_micro_batch(
    config: Config, placement: Placement, shapes: Shapes, machine: Machine
) -> Placement:
    """The first of the candidates that fits with a margin, or else the last."""
    refused: dict[int, str] = {}
    for tokens, freq in _candidates(config, placement):
        placement = replace(placement, micro_batch_tokens=tokens, ac_freq=freq)
        need = _need(Memory(config, placement, shapes, machine).devices())
        if not need:
            break
        refused[freq] = f"{tokens:,} tokens need {need}"
    tokens, freq = placement.micro_batch_tokens, placement.ac_freq
    tokens_reason = ac_reason = SET
    if config.trainer.micro_batch_tokens == "auto":
        tokens_reason = refused.get(freq, "they fit")
    if config.trainer.model.ac == "auto":
        ac_reason = f"without it {refused[0]}" if freq else "activations fit"
    layers = "every layer" if freq == 1 else f"one of {freq} layers"
    choices = (
        Choice("trainer.micro_batch_tokens", f"{tokens:,} tokens", tokens_reason),
        Choice("trainer.model.ac", layers if freq else "off", ac_reason),
    )
    return replace(placement, choices=(*placement.choices, *choices))


def _candidates(config: Config, placement: Placement) -> Iterator[tuple[int, int]]:
    """Tokens of a micro-batch and the frequency of recomputed layers, the fastest first."""
    tokens, ac = config.trainer.micro_batch_tokens, config.trainer.model.ac
    sizes = _sizes(config, placement) if tokens == "auto" else [tokens]
    if ac != "auto":
        freq = ac.freq if isinstance(ac, AcConfig) else 0
        yield from ((size, freq) for size in sizes)
        return
    # a CPU is as fast with few tokens
    efficient = EFFICIENT_TOKENS if placement.trainer_gpus else 0
    yield from ((size, 0) for size in sizes if size >= efficient or len(sizes) == 1)
    yield from ((size, 1) for size in sizes)


def _sizes(config: Config, placement: Placement) -> list[int]:
    """Sizes of a micro-batch: half as many tokens each time, down to one sequence."""
    largest = MICRO_BATCH_TOKENS
    if not placement.trainer_gpus:  # a group's prompt is computed once only if it is not divided
        largest = min(largest, max(CPU_MICRO_BATCH_TOKENS, largest_group(config, placement)[1]))
    sizes = [largest]
    while sizes[-1] > placement.max_length:
        sizes.append(max(sizes[-1] // 2, placement.max_length))
    return sizes


def _need(devices: Sequence[Device]) -> str:
    """What the trainer's passes need, if that is more than is chosen; otherwise empty."""
    for device in devices:
        limit = int(MARGIN * device.usable)
        for phase in TRAINER_PHASES:
            need = sum(device.phases.get(phase, {}).values())
            if need > limit:
                return f"{need / GIB:.1f} of {limit / GIB:.1f} GiB"
    return ""
