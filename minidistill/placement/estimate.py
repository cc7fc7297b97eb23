"""Whether a placement fits into memory, from the configuration and the model's alone."""

from __future__ import annotations

from collections.abc import Mapping
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
    sync_buffer,
    trainer_memory,
    worst_load,
)
from minidistill.placement.model_shape import ModelShape, Shapes
from minidistill.placement.placement import Models, Placement, place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILL = 0.95  # of a GPU with a trainer: its allocator needs headroom


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine's own memory, and what is in it."""

    id: int | None
    """None is the CPU's memory."""
    bytes: int
    usable: int
    phases: Mapping[str, MemoryBreakdown]
    """Bytes by phase of a step and by "owner: part". Engines sleep where they share with a trainer,
    so what must fit is the largest phase, not the sum."""

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
    """Sequences of `seq_len` whose keys and values each engine holds, all replicas together."""
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
    ranks = placement.ranks
    local_ranks = len(placement.devices)
    shape, itemsize = shapes.student, DTYPES[placement.dtype].itemsize
    device = torch.device(machine.device_type)
    context = {"trainer: CUDA context": CONTEXT} if machine.gpus else {}
    needs = trainer_memory(
        config,
        shape,
        placement.teacher,
        worst_load(config, ranks),
        device,
        itemsize,
        ranks if placement.sharded else 1,
        shapes.teacher if config.separate_teacher else None,
    )
    training = {**context, **_owned("trainer", needs)}
    resident = {
        **context,
        **_owned("trainer", {k: needs[k] for k in RESIDENT if k in needs}),
    }
    problems: list[str] = []
    warnings = list(placement.warnings)
    engines = _engines(config, shapes, machine, placement, itemsize)
    sequences = {}
    for engine in engines:
        sequences[engine.owner] = engine.sequences(config)
        engine.judge(config, problems, warnings)
    devices = []
    for gpu in sorted({g for e in engines for g in e.gpus} | {*placement.trainer_gpus}):
        local = [engine for engine in engines if gpu in engine.gpus]
        phases: dict[str, MemoryBreakdown] = {}
        trains = gpu in placement.trainer_gpus
        buffer = {}
        if trains and gpu == placement.trainer_gpus[0] and engines:
            buffer = {"trainer: sync buffer": sync_buffer(config, shape, itemsize)}
        awake: MemoryBreakdown = {}
        for engine in local:
            awake |= _owned(engine.owner, engine.memory)
        if awake:
            phases["sampling"] = awake | (resident | buffer if trains else {})
        elif trains and not engines:
            cache = {"trainer: keys and values": embedded_cache(placement, config, itemsize)}
            phases["sampling"] = resident | cache
        if trains:
            asleep = {f"{engine.owner}: CUDA context": CONTEXT for engine in local}
            phases["training"] = training | buffer | asleep
        usable = int(FILL * machine.bytes) if trains else machine.bytes
        devices.append(Device(gpu, machine.bytes, usable, phases))
    if not machine.gpus:
        held: MemoryBreakdown = {}
        cache = {"engine: keys and values": embedded_cache(placement, config, itemsize)}
        if not placement.student.in_trainer:
            held, cache = cpu_engines(placement, shapes, itemsize), {}
        phases = {
            "sampling": _all_ranks(resident, local_ranks - 1) | held | cache,
            "training": _all_ranks(training, local_ranks - 1) | held,
        }
        devices.append(Device(None, machine.bytes, int(FILL * machine.bytes), phases))
    problems += _overfull(devices)
    return Plan(
        config=config,
        placement=placement,
        shape=shape,
        devices=tuple(devices),
        sequences=sequences,
        work=step_work(config, shape, shapes.teacher),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


OTHER_RANKS = "trainer: other ranks"
# What the trainer holds between steps
RESIDENT = ("weights", "reference copy", "adapter", "optimizer")


@dataclass(frozen=True, slots=True)
class _Engine:
    owner: str
    gpus: tuple[int, ...]
    dp: int
    kv_bytes: int
    """Of a token's keys and values on one GPU."""
    memory: MemoryBreakdown
    """On each of its GPUs."""

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
            self.memory["keys and values"] = 0
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
    apart = teacher is not None and bool(teacher.gpus)
    adapters = {
        "student": 2 if update == "ema" and not apart else 1,
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


def _all_ranks(driver: MemoryBreakdown, others: int) -> MemoryBreakdown:
    """What the trainer's processes on one machine take together."""
    return {**driver, OTHER_RANKS: others * sum(driver.values())} if others else driver


def _owned(owner: str, parts: MemoryBreakdown) -> MemoryBreakdown:
    return {f"{owner}: {name}": size for name, size in parts.items() if size}


def _overfull(devices: list[Device]) -> list[str]:
    problems = []
    for device in devices:
        for phase, parts in device.phases.items():
            if (need := sum(parts.values())) > device.usable:
                problems.append(
                    f"{device.name}: {phase} needs {need / GIB:.1f} GiB "
                    f"of {device.usable / GIB:.1f} usable"
                )
    return problems
