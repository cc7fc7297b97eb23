"""Whether a placement fits into memory, estimated without loading any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minidistill.config import Config
from minidistill.placement.flops import Work, step_work
from minidistill.placement.limits import kv_bytes_per_token
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.memory import (
    CONTEXT,
    MemoryBreakdown,
    cpu_engines,
    embedded_cache,
    engine_memory,
    largest_micro_batch,
    sync_buffer,
    trainer_memory,
)
from minidistill.placement.model_shape import ModelShape, Shapes
from minidistill.placement.placement import Models, Placement, place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILL = 0.95  # of a device with a trainer: its allocator needs headroom
RESIDENT = ("weights", "reference copy", "adapter", "optimizer")  # in the trainer between steps
OTHER_RANKS = "trainer: other ranks"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine's own memory, and what is in it."""

    id: int | None
    """None is the CPU's memory."""
    bytes: int
    usable: int
    phases: Mapping[str, MemoryBreakdown]
    """Bytes by phase of a step and by "owner: part". Engines that share a GPU with the trainer
    sleep while it trains, so the largest phase must fit, not the sum."""

    @property
    def name(self) -> str:
        return "CPU" if self.id is None else f"GPU {self.id}"

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max((sum(parts.values()) for parts in self.phases.values()), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, and whether it fits."""

    config: Config
    placement: Placement
    shape: ModelShape
    """Of the student."""
    devices: tuple[Device, ...]
    sequences: Mapping[str, int]
    """How many sequences of `seq_len` the KV cache of each engine holds, over all replicas."""
    work: Mapping[str, Work]
    problems: tuple[str, ...]
    """Why it does not fit; empty if it does."""
    warnings: tuple[str, ...]
    change: Mapping[str, Any] | None = field(default_factory=dict)
    """Settings with which it fits; None if none were found."""

    @property
    def fits(self) -> bool:
        return not self.problems


def estimate(config: Config, shapes: Shapes, models: Models, machine: Machine) -> Plan:
    """The plan of a configuration as it is. Raises UserError as `place` does."""
    placement = place(config, models, machine)
    itemsize = DTYPES[placement.dtype].itemsize
    trainer = _trainer(config, shapes, machine, placement, itemsize)
    engines = _engines(config, shapes, machine, placement, itemsize)
    problems: list[str] = []
    warnings = list(placement.warnings)
    for engine in engines:
        engine.judge(config, problems, warnings)
    if machine.gpus:
        gpus = {*trainer.gpus}.union(*(engine.gpus for engine in engines))
        devices = [_gpu(gpu, machine, trainer, engines) for gpu in sorted(gpus)]
    else:
        devices = [_cpu(machine, trainer, cpu_engines(placement, shapes, itemsize))]
    problems += _overfull(devices)
    return Plan(
        config=config,
        placement=placement,
        shape=shapes.student,
        devices=tuple(devices),
        sequences={engine.owner: engine.sequences(config) for engine in engines},
        work=step_work(config, shapes.student, shapes.teacher),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, slots=True)
class _Engine:
    """An engine on this machine's GPUs."""

    owner: str
    gpus: tuple[int, ...]
    dp: int
    kv_bytes: int
    """Of a token's keys and values on one GPU."""
    memory: MemoryBreakdown
    """On each of its GPUs. The size of keys and values is negative if nothing is left for them."""

    def sequences(self, config: Config) -> int:
        room = self.memory["keys and values"]
        return max(0, room // (self.kv_bytes * config.seq_len)) * self.dp

    def judge(self, config: Config, problems: list[str], warnings: list[str]) -> None:
        """Report an engine that cannot hold one sequence, or not a whole batch."""
        held, batch = self.sequences(config), config.orchestrator.batch_size
        if held == 0:
            problems.append(
                f"the {self.owner}'s engine has no room for one sequence of "
                f"{config.seq_len} tokens on GPU {', '.join(map(str, self.gpus))}"
            )
        elif held < batch:
            warnings.append(
                f"the {self.owner}'s engine holds {held} sequences of {config.seq_len} tokens: "
                f"a batch of {batch} goes through in several rounds"
            )


def _engines(
    config: Config, shapes: Shapes, machine: Machine, placement: Placement, itemsize: int
) -> list[_Engine]:
    """The engines on this machine's GPUs, with the memory of each GPU."""
    update, engines = config.orchestrator.teacher_model.update, []
    student, teacher = placement.student, placement.teacher_engine
    separate = teacher is not None and bool(teacher.gpus)
    adapters = {
        "student": 2 if update == "ema" and not separate else 1,
        "teacher": 0 if update == "frozen" or config.separate_teacher else 1,
    }
    for owner, engine, shape in (
        ("student", student, shapes.student),
        ("teacher", teacher, shapes.teacher),
    ):
        if engine is not None and engine.gpus:
            budget = int(engine.memory_share * machine.bytes)
            kv_bytes = kv_bytes_per_token(engine.model_config, itemsize, engine.tp)
            memory = engine_memory(config, shape, itemsize, engine.tp, budget, adapters[owner])
            engines.append(_Engine(owner, engine.gpus, engine.dp, kv_bytes, memory))
    return engines


@dataclass(frozen=True, slots=True)
class _Trainer:
    """The trainer's ranks on this machine. Memory is by "owner: part"."""

    gpus: tuple[int, ...]
    other_ranks: int
    """Besides the first one."""
    training: MemoryBreakdown
    """Of one rank at its peak."""
    sampling: MemoryBreakdown
    """Of one rank while engines sample."""
    cache: MemoryBreakdown
    """Keys and values, if the trainer's own model samples."""
    buffer: MemoryBreakdown
    """For syncs. Only the first of its GPUs has one."""


def _trainer(
    config: Config, shapes: Shapes, machine: Machine, placement: Placement, itemsize: int
) -> _Trainer:
    parts = trainer_memory(
        config,
        shapes.student,
        placement.teacher,
        largest_micro_batch(config, placement.ranks),
        torch.device(machine.device_type),
        itemsize,
        placement.ranks if placement.sharded else 1,
        shapes.teacher if config.separate_teacher else None,
        placement.attention,
    )
    context = {"CUDA context": CONTEXT} if machine.gpus else {}
    resident = {name: parts[name] for name in RESIDENT if name in parts}
    cache, buffer = {}, {}
    if placement.student.in_trainer:
        owner = "trainer" if machine.gpus else "engine"
        size = embedded_cache(placement, config, itemsize)
        cache = {f"{owner}: keys and values": size}
    if placement.student.gpus:
        buffer = {"trainer: sync buffer": sync_buffer(config, shapes.student, itemsize)}
    return _Trainer(
        gpus=placement.trainer_gpus,
        other_ranks=len(placement.devices) - 1,
        training=_owned("trainer", context | parts),
        sampling=_owned("trainer", context | resident),
        cache=cache,
        buffer=buffer,
    )


def _gpu(gpu: int, machine: Machine, trainer: _Trainer, engines: Sequence[_Engine]) -> Device:
    local = [engine for engine in engines if gpu in engine.gpus]
    sampling: MemoryBreakdown = {}
    for engine in local:
        sampling |= _owned(engine.owner, engine.memory)
    if gpu not in trainer.gpus:
        return Device(gpu, machine.bytes, machine.bytes, {"sampling": sampling})
    buffer = trainer.buffer if gpu == trainer.gpus[0] else {}
    phases = {"training": trainer.training | buffer}
    if local:
        asleep = {f"{engine.owner}: CUDA context": CONTEXT for engine in local}
        phases = {
            "sampling": sampling | trainer.sampling | buffer,
            "training": trainer.training | buffer | asleep,
        }
    elif trainer.cache:
        phases = {"sampling": trainer.sampling | trainer.cache, **phases}
    return Device(gpu, machine.bytes, int(FILL * machine.bytes), phases)


def _cpu(machine: Machine, trainer: _Trainer, engines: MemoryBreakdown) -> Device:
    """The CPU's memory, which holds all ranks and engines. Engines do not sleep there."""
    phases = {
        "sampling": _all_ranks(trainer.sampling, trainer.other_ranks) | engines | trainer.cache,
        "training": _all_ranks(trainer.training, trainer.other_ranks) | engines,
    }
    return Device(None, machine.bytes, int(FILL * machine.bytes), phases)


def _all_ranks(driver: MemoryBreakdown, others: int) -> MemoryBreakdown:
    """The memory of all of the trainer's processes on one machine."""
    return {**driver, OTHER_RANKS: others * sum(driver.values())} if others else driver


def _owned(owner: str, parts: MemoryBreakdown) -> MemoryBreakdown:
    return {f"{owner}: {name}": size for name, size in parts.items() if size > 0}


def _overfull(devices: Sequence[Device]) -> list[str]:
    problems = []
    for device in devices:
        for phase, parts in device.phases.items():
            if (need := sum(parts.values())) > device.usable:
                problems.append(
                    f"{device.name}: {phase} needs {need / GIB:.1f} GiB "
                    f"of {device.usable / GIB:.1f} usable"
                )
    return problems
