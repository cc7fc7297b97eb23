"""How long a step takes and how long each GPU is idle: a roofline, never measured.

A step's phases are bound by a card's memory bandwidth or its matrix products. The shares of a
card's peak that they reach are assumed, as are completions of half the longest length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minidistill.config import Config
from minidistill.placement.devices import DTYPES, Memory
from minidistill.placement.flops import Work
from minidistill.placement.limits import completion_tokens
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.model_shape import ModelShape
from minidistill.placement.placement import EnginePlacement, Placement, sampling_engine


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's peaks, from its maker's data sheet."""

    name: str
    gib: int
    bandwidth: float
    """Bytes of memory a second."""
    flops: float
    """Operations a second in dense 16-bit matrix products."""


CARDS = (
    Card("H100", 80, 3.35e12, 989e12),
    Card("H200", 141, 4.8e12, 989e12),
    Card("A100", 80, 2.04e12, 312e12),
    Card("A100", 40, 1.56e12, 312e12),
    Card("L40S", 48, 0.86e12, 362e12),
    Card("RTX 4090", 24, 1.01e12, 165e12),
    Card("L4", 24, 0.30e12, 121e12),
)
"""Of several cards of one size, the first is assumed if only the size is known."""

# Shares of the peaks that are reached. Assumed.
DECODING, PREFILL, TRAINING = 0.6, 0.5, 0.35
DECODING_SECONDS = 0.003
"""The least time of a decoding step: vLLM's own work. Assumed."""
MEAN_COMPLETION = 0.5
"""Of the longest one. Assumed."""
HIDDEN = 0.5
"""The share of a shorter phase that hides behind a longer one on other GPUs, under `sync`: scoring
and training begin with the groups of rollouts that are complete. Assumed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a step."""

    card: Card
    named: bool
    """The machine names its card; otherwise it was assumed from the memory's size."""
    sample: float
    teacher: float
    train: float
    step: float
    idle: Mapping[int, float]
    """The share of the step in which a GPU does nothing, by GPU."""

    @property
    def mean_idle(self) -> float:
        return sum(self.idle.values()) / len(self.idle)


@dataclass(frozen=True, slots=True)
class Layout:
    """Settings, and the seconds of a step with them."""

    settings: Mapping[str, Any]
    seconds: float


def card_of(machine: Machine) -> tuple[Card, bool]:
    """The machine's card, and whether it is known by name. Unknown cards are taken for the one
    whose memory is the closest in size."""
    words = re.findall(r"[A-Z]+\d+S?|\d{4}", machine.card.upper())
    named = [card for card in CARDS if card.name.split()[-1] in words]
    size = machine.bytes / GIB
    return min(named or CARDS, key=lambda card: abs(card.gib - size)), bool(named)


def step_timing(memory: Memory, work: Mapping[str, Work], machine: Machine) -> Timing | None:
    """The time of a step on GPUs. None on a CPU, with servers, and where the trainer's own model
    samples: nothing is idle for long there, or it is not known."""
    config, placement = memory.config, memory.placement
    student, teacher = placement.student, placement.teacher_engine
    sampler = sampling_engine(config, student, teacher)
    if sampler is None or not sampler.gpus or (teacher is not None and teacher.urls):
        return None
    card, named = card_of(machine)
    sample = _sampling(memory, card, sampler)
    mean = {name: _mean_flops(config, placement, work[name]) for name in ("teacher", "train")}
    scoring = mean["teacher"] / (PREFILL * card.flops)
    train = mean["train"] / (TRAINING * card.flops * placement.ranks)
    busy = dict.fromkeys(memory.gpus, 0.0)
    in_trainer = placement.teacher.scorer == "trainer"
    scored_on = teacher.gpus if teacher else student.gpus
    if in_trainer:
        scored_on = placement.trainer_gpus
    scoring /= placement.ranks if in_trainer else len(scored_on)
    for gpus, seconds in (
        (sampler.gpus, sample),
        (scored_on, scoring),
        (placement.trainer_gpus, train),
    ):
        for gpu in gpus:
            busy[gpu] += seconds
    total, longest = sample + scoring + train, max(busy.values())
    if config.schedule == "async":
        engines = sample + (0.0 if in_trainer else scoring)
        step = max(engines, total - engines)
    else:
        step = total - HIDDEN * (total - longest)
    idle = {gpu: 1 - seconds / step for gpu, seconds in busy.items()}
    return Timing(card, named, sample, scoring, train, step, idle)


def _mean_flops(config: Config, placement: Placement, work: Work) -> float:
    """The operations of a stage's work if completions have their mean length."""
    longest = config.orchestrator.batch_size * completion_tokens(config, placement.max_length)
    if not work.tokens:
        return 0.0
    return work.flops * (1 - (1 - MEAN_COMPLETION) * longest / work.tokens)


def _sampling(memory: Memory, card: Card, engine: EnginePlacement) -> float:
    """Seconds of sampling a step's rollouts: prompts are read once a group, then each decoding step
    reads the weights, and the keys and values of the sequences that are not done."""
    config, own = memory.config, engine is memory.placement.teacher_engine
    shape = memory.shapes.teacher if own else memory.shapes.student
    itemsize = DTYPES[memory.placement.dtype].itemsize
    orchestrator = config.orchestrator
    longest = completion_tokens(config, memory.placement.max_length)
    prompt = memory.placement.max_length - longest
    completion = MEAN_COMPLETION * longest
    rollouts = orchestrator.batch_size / engine.dp  # of one replica
    bandwidth, flops = DECODING * card.bandwidth, PREFILL * card.flops * engine.tp
    owner = "teacher" if own else "student"
    (held_by,) = (e for e in memory.engines if e.owner == owner)
    held = max(1, held_by.sequences / engine.dp)
    steps = max(longest, rollouts * completion / held)
    weights = shape.text * itemsize / engine.tp / bandwidth
    cache = (
        rollouts
        * completion
        * (prompt + completion / 2)
        * held_by.sequence_bytes
        / memory.placement.max_length
        / bandwidth
    )
    reading = steps * max(DECODING_SECONDS, weights) + cache
    computing = 2 * _read(shape) * rollouts * completion / flops
    groups = rollouts / orchestrator.rollouts_per_example
    return max(reading, computing) + 2 * _read(shape) * groups * prompt / flops


def _read(shape: ModelShape) -> int:
    """Parameters of the matrix products of a token."""
    return shape.body + shape.vocab * shape.hidden
