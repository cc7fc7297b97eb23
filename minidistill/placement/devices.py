"""What is in the memory of each device, in each phase of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from minidistill.config import Config
from minidistill.placement.engine_memory import (
    CONTEXT,
    GRAPHS,
    cpu_engines,
    embedded_cache,
    engine_memory,
    packed_copy,
    received_memory,
    sync_buffer,
)
from minidistill.placement.limits import kv_bytes_per_token
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.memory import (
    MemoryBreakdown,
    evaluation_memory,
    largest_micro_batch,
    trainer_memory,
)
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import EnginePlacement, Placement

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILL = 0.95  # of a device with a trainer: its allocator needs headroom
RESIDENT = ("weights", "reference copy", "adapter", "optimizer")  # in the trainer between steps
OTHER_RANKS = "trainer: other ranks"
BUFFER, DRIVER = "trainer: sync buffer", "trainer: the driver's CUDA context"
STAGED = (BUFFER, DRIVER)
"""What the driver has on GPUs that it does not train on."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine's own memory, and what is in it."""

    id: int | None
    """None is the CPU's memory."""
    bytes: int
    usable: int
    phases: Mapping[str, MemoryBreakdown]
    """Bytes by phase and by "owner: part". Engines that share a GPU with the trainer sleep while it
    works, so the largest phase must fit, not the sum."""

    @property
    def name(self) -> str:
        return "CPU" if self.id is None else f"GPU {self.id}"

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max((sum(parts.values()) for parts in self.phases.values()), default=0)


@dataclass(frozen=True, slots=True)
class EngineOnGpus:
    """An engine on this machine's GPUs. Memory is on each of them, by part."""

    owner: str
    table: str
    """Of its settings in the configuration."""
    placement: EnginePlacement
    sequence_bytes: int
    """Of the keys and values of the longest sequence on one GPU."""
    budget: MemoryBreakdown
    """What its share of the memory holds. The size of keys and values is negative if nothing is
    left for them."""
    received: MemoryBreakdown
    """What it takes outside its budget during a sync."""

    @property
    def gpus(self) -> tuple[int, ...]:
        return self.placement.gpus

    @property
    def sequences(self) -> int:
        """The longest sequences whose keys and values have room at a time, in all replicas."""
        return max(0, self.budget["keys and values"] // self.sequence_bytes) * self.placement.dp


class Memory:
    """The memory of a placement on a machine, device by device."""

    def __init__(
        self, config: Config, placement: Placement, shapes: Shapes, machine: Machine
    ) -> None:
        self.config, self.placement, self.shapes = config, placement, shapes
        self.itemsize = DTYPES[placement.dtype].itemsize
        self.on_gpus = machine.gpus > 0
        teacher = placement.teacher_engine
        used = {
            *placement.trainer_gpus,
            *placement.student.gpus,
            *(teacher.gpus if teacher else ()),
        }
        self.gpus = sorted(used)
        self.bytes = machine.smallest(used)
        """Of each device."""
        self.engines = self._engines()
        self._trainer_parts()

    def usable(self, gpu: int | None) -> int:
        """Bytes of a device that a plan may fill."""
        shared = gpu is None or gpu in self.placement.trainer_gpus
        return int(FILL * self.bytes) if shared else self.bytes

    def devices(self) -> list[Device]:
        if self.on_gpus:
            return [
                Device(gpu, self.bytes, self.usable(gpu), self._phases(gpu)) for gpu in self.gpus
            ]
        return [Device(None, self.bytes, self.usable(None), self._cpu_phases())]

    def beside_engines(self, gpu: int) -> int:
        """The most bytes of a GPU that are taken outside the budgets of engines that are awake."""
        outside = self._beside_engines(gpu)
        received = self._received(gpu)
        return sum(outside.values()) + sum(received.values())

    # -- the engines -----------------------------------------------------------------------------

    def _engines(self) -> list[EngineOnGpus]:
        config, placement, engines = self.config, self.placement, []
        update = config.orchestrator.teacher_model.update
        separate = placement.teacher_engine is not None and bool(placement.teacher_engine.gpus)
        frozen = update == "frozen" or config.separate_teacher is not None
        adapters = {
            "student": 2 if update == "ema" and not separate else 1,
            "teacher": 0 if frozen else 1,
        }
        for owner, table, engine, shape in (
            ("student", "inference", placement.student, self.shapes.student),
            ("teacher", "teacher_inference", placement.teacher_engine, self.shapes.teacher),
        ):
            if engine is None or not engine.gpus:
                continue
            budget = int(engine.memory_share * self.bytes)
            received: MemoryBreakdown = {}
            if adapters[owner]:
                received = received_memory(config, shape, self.itemsize, engine.tp)
            engines.append(
                EngineOnGpus(
                    owner=owner,
                    table=table,
                    placement=engine,
                    sequence_bytes=placement.max_length
                    * kv_bytes_per_token(engine.model_config, self.itemsize, engine.tp),
                    budget=engine_memory(
                        config, shape, self.itemsize, engine.tp, budget, adapters[owner]
                    ),
                    received=received,
                )
            )
        return engines

    # -- the trainer -----------------------------------------------------------------------------

    def _trainer_parts(self) -> None:
        config, placement, shape = self.config, self.placement, self.shapes.student
        size = largest_micro_batch(config, placement)
        device = torch.device("cuda" if self.on_gpus else "cpu")
        shards = placement.ranks if placement.sharded else 1
        other = self.shapes.teacher if config.separate_teacher else None
        training = trainer_memory(
            config, placement, shape, size, device, self.itemsize, shards, other
        )
        evaluating = evaluation_memory(
            config, placement, shape, size, device, self.itemsize, shards
        )
        if self.on_gpus:  # the trainer's model samples for the drift, and for its own teacher
            kv_bytes = kv_bytes_per_token(placement.student.model_config, self.itemsize)
            evaluating["keys and values"] = kv_bytes * placement.max_length
        context = {"CUDA context": CONTEXT} if self.on_gpus else {}
        resident = context | {name: training[name] for name in RESIDENT if name in training}
        self._resident = _owned("trainer", resident)
        """Of one rank while engines sample."""
        self._training = _owned("trainer", context | training)
        self._evaluating = _owned("trainer", resident | evaluating)
        self._gathered = {"trainer: gathered weights": evaluating.get("gathered weights", 0)}
        self._buffer = sync_buffer(config, shape, self.itemsize) if self._syncs else 0

    @property
    def _syncs(self) -> bool:
        return bool(self.placement.student.gpus)

    # -- a GPU -----------------------------------------------------------------------------------

    def _phases(self, gpu: int) -> dict[str, MemoryBreakdown]:
        local = [engine for engine in self.engines if gpu in engine.gpus]
        trains = gpu in self.placement.trainer_gpus
        beside, received = self._beside_engines(gpu), self._received(gpu)
        phases: dict[str, MemoryBreakdown] = {}
        if local:
            awake = beside
            for engine in local:
                awake = awake | _owned(engine.owner, engine.budget)
            if self.config.trainer.model.lora:  # an adapter is small: not a phase of its own
                phases["sampling"] = awake | received
            else:
                phases["sampling"] = awake
                phases["syncing"] = awake | received
        elif trains and self.placement.student.in_trainer:
            phases["sampling"] = self._resident | self._gathered | self._cache(gpu)
        if trains:
            buffer = self._buffers(gpu)
            asleep: MemoryBreakdown = {}
            for engine in local:
                asleep |= _owned(engine.owner, {"CUDA context": CONTEXT, "CUDA graphs": GRAPHS})
            phases["training"] = self._training | buffer | asleep
            phases["evaluating"] = self._evaluating | buffer | asleep
        return phases

    def _beside_engines(self, gpu: int) -> MemoryBreakdown:
        """What is on a GPU outside the budgets of the engines that are awake there."""
        parts = self._buffers(gpu)
        for engine in self.engines:
            if gpu in engine.gpus:
                parts |= _owned(engine.owner, {"CUDA context": CONTEXT})
        return parts | (self._resident if gpu in self.placement.trainer_gpus else {})

    def _received(self, gpu: int) -> MemoryBreakdown:
        parts: MemoryBreakdown = {}
        for engine in self.engines:
            if gpu in engine.gpus:
                parts |= _owned(engine.owner, engine.received)
        return parts

    def _buffers(self, gpu: int) -> MemoryBreakdown:
        """The driver's buffer for syncs. Workers on another GPU read a copy there, for which the
        driver has a CUDA context on that GPU."""
        if not self._buffer:
            return {}
        if gpu == self.placement.trainer_gpus[0]:
            return {BUFFER: self._buffer}
        if any(engine.received for engine in self.engines if gpu in engine.gpus):
            return {BUFFER: self._buffer, DRIVER: CONTEXT}
        return {}

    def _cache(self, gpu: int) -> MemoryBreakdown:
        """The embedded engine's keys and values."""
        taken = sum(self._resident.values()) + sum(self._gathered.values())
        room = self.usable(gpu) - taken
        size = embedded_cache(self.placement, self.config, self.itemsize, room // 2)
        return {"trainer: keys and values": size}

    # -- the CPU ---------------------------------------------------------------------------------

    def _cpu_phases(self) -> dict[str, MemoryBreakdown]:
        """The CPU's memory holds all ranks and engines. Engines do not sleep there."""
        placement, others = self.placement, self.placement.ranks - 1
        engines = cpu_engines(placement, self.shapes, self.itemsize)
        cache: MemoryBreakdown = {}
        kept: MemoryBreakdown = {}
        if placement.student.in_trainer:
            size = embedded_cache(placement, self.config, self.itemsize)
            packed = packed_copy(self.shapes.student, self.itemsize, self.bytes)
            cache = _owned("engine", {"keys and values": size, "packed weights": packed})
            if self.config.trainer.model.lora:  # in float16, of a frozen base
                kept = _owned("engine", {"packed weights": packed // 2})
        return {
            "sampling": _all_ranks(self._resident, others) | engines | cache,
            "training": _all_ranks(self._training, others) | engines | kept,
            "evaluating": _all_ranks(self._evaluating, others) | engines | kept,
        }


def _all_ranks(driver: MemoryBreakdown, others: int) -> MemoryBreakdown:
    """The memory of all of the trainer's processes on one machine."""
    return {**driver, OTHER_RANKS: others * sum(driver.values())} if others else driver


def _owned(owner: str, parts: Mapping[str, int]) -> MemoryBreakdown:
    return {f"{owner}: {name}": size for name, size in parts.items() if size > 0}


def overfull(devices: Sequence[Device]) -> list[str]:
    """A sentence for each phase of a device that needs more than it may fill."""
    return [
        f"{device.name}: {phase} needs {need / GIB:.1f} GiB of {device.usable / GIB:.1f} usable"
        for device in devices
        for phase, parts in device.phases.items()
        if (need := sum(parts.values())) > device.usable
    ]
