"""What would run where, and whether it fits: from the configuration and the model's, no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minidistill.config import Config
from minidistill.placement.devices import DTYPES, shards_weights
from minidistill.placement.flops import Work, work
from minidistill.placement.gpus import Partition, check_schedule, engine_share, partition
from minidistill.placement.memory import (
    CONTEXT,
    Parts,
    cpu_engines,
    embedded_cache,
    engine_memory,
    sync_buffer,
    trainer_memory,
    worst_load,
)
from minidistill.placement.model_shape import Shape, read_shape
from minidistill.placement.teacher import Teaching, decide

FILL = 0.95  # of a GPU with a trainer: its allocator needs room to move
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine's own memory, and what is in it."""

    id: int | None
    """None is the CPU's memory."""
    bytes: int
    usable: int
    phases: Mapping[str, Parts]
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
    """A run on a machine."""

    config: Config
    shape: Shape
    dtype: str
    vllm: bool
    """The student samples with vLLM, here or on servers."""
    partition: Partition
    teaching: Teaching
    sharded: bool
    """The trainer's ranks hold a part of the weights each, not all of them."""
    devices: tuple[Device, ...]
    sequences: Mapping[str, int]
    """Sequences of `seq_len` whose keys and values each engine holds, all replicas together."""
    work: Mapping[str, Work]
    problems: tuple[str, ...]
    """Why it does not fit; empty where it does."""
    warnings: tuple[str, ...]
    change: Mapping[str, Any] | None = field(default_factory=dict)
    """Settings with which it fits; None where none were found."""

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def teacher(self) -> str:
        """Where the teacher is scored, and why."""
        if self.teaching.scorer == "trainer":
            return f"in the trainer: {self.teaching.reason}"
        if self.config.teacher_inference.server_urls:
            return "on a server of its own"
        return "in an engine of its own" if self.partition.teacher else "in the student's engine"


def plan(
    config: Config,
    model_config: Any,
    gpus: int,
    gpu_bytes: int,
    *,
    teacher_config: Any = None,
    vllm: bool | None = None,
) -> Plan:
    """The plan for `gpus` GPUs of `gpu_bytes` each, or for a CPU's memory where there are none.

    `model_config` is the model's configuration as transformers reads it, `teacher_config` that of a
    teacher that is another model. `vllm` says whether the run samples with vLLM; by default it does
    on GPUs unless the configuration says otherwise. Where the plan does not fit, `change` names
    the settings with which it would. Raises UserError for a division of GPUs that cannot be.
    """
    from minidistill.placement.suggest import smallest_change

    shape = read_shape(model_config)
    teacher = shape if teacher_config is None else read_shape(teacher_config)
    machine = Machine(gpus, gpu_bytes, vllm)
    found = lay_out(config, shape, teacher, machine)
    if found.fits:
        return found
    return replace(found, change=smallest_change(found, teacher, machine))


@dataclass(frozen=True, slots=True)
class Machine:
    """What is planned for."""

    gpus: int
    bytes: int
    vllm: bool | None

    def samples_with_vllm(self, config: Config) -> bool:
        if self.vllm is not None:
            return self.vllm
        asked = config.inference.engine
        if config.inference.server_urls:
            return True
        return asked == "vllm" or (asked == "auto" and self.gpus > 0)


def lay_out(config: Config, shape: Shape, teacher: Shape, machine: Machine) -> Plan:
    """The plan of a configuration as it is. Raises UserError as `partition` does."""
    vllm = machine.samples_with_vllm(config)
    teaching = decide(config, vllm, token_ids=machine.gpus > 0)
    parts = partition(config, machine.gpus, teaching, shape.heads, vllm)
    check_schedule(config, vllm, parts.sleeps)
    sharded = parts.ranks if shards_weights(config, parts.ranks) else 1
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if machine.gpus else "float32"
    size = DTYPES[dtype].itemsize
    device = torch.device("cuda" if machine.gpus else "cpu")
    context = {"trainer: CUDA context": CONTEXT} if machine.gpus else {}
    load = worst_load(config, parts.ranks)
    other = teacher if config.separate_teacher else None
    needs = trainer_memory(config, shape, teaching, load, device, size, sharded, other)
    training = {**context, **_owned("trainer", needs)}
    resident = {
        **context,
        **_owned("trainer", {k: needs[k] for k in RESIDENT if k in needs}),
    }
    problems: list[str] = []
    warnings = list(parts.warnings)
    engines = _engines(config, shape, teacher, machine, parts, size)
    sequences = {}
    for engine in engines:
        sequences[engine.owner] = engine.sequences(config)
        engine.judge(config, problems, warnings)
    devices = []
    for id in sorted({*parts.inference, *parts.teacher, *parts.trainer}):
        here = [engine for engine in engines if id in engine.ids]
        phases: dict[str, Parts] = {}
        trains = id in parts.trainer
        buffer = {}
        if trains and id == parts.trainer[0] and engines:
            buffer = {"trainer: sync buffer": sync_buffer(config, shape, size)}
        awake: Parts = {}
        for engine in here:
            awake |= _owned(engine.owner, engine.parts)
        if awake:
            phases["sampling"] = awake | (resident | buffer if trains else {})
        elif trains and not engines:
            cache = {"trainer: keys and values": embedded_cache(config, shape, size)}
            phases["sampling"] = resident | cache
        if trains:
            asleep = {f"{engine.owner}: CUDA context": CONTEXT for engine in here}
            phases["training"] = training | buffer | asleep
        usable = int(FILL * machine.bytes) if trains else machine.bytes
        devices.append(Device(id, machine.bytes, usable, phases))
    if not machine.gpus:
        held, cache = {}, {"engine: keys and values": embedded_cache(config, shape, size)}
        if vllm:
            held, cache = cpu_engines(config, shape, teacher, teaching, size), {}
        phases = {
            "sampling": _ranks(resident, parts.ranks - 1) | held | cache,
            "training": _ranks(training, parts.ranks - 1) | held,
        }
        devices.append(Device(None, machine.bytes, int(FILL * machine.bytes), phases))
    problems += _overfull(devices)
    return Plan(
        config, shape, dtype, vllm, parts, teaching, sharded > 1, tuple(devices), sequences,
        work(config, shape, teacher), tuple(problems), tuple(warnings),
    )  # fmt: skip


OTHER_RANKS = "trainer: other ranks"
# What the trainer holds between its steps
RESIDENT = ("weights", "reference copy", "adapter", "optimizer")


@dataclass(frozen=True, slots=True)
class _Engine:
    owner: str
    ids: tuple[int, ...]
    dp: int
    a_token: int
    """Bytes of a token's keys and values on one GPU."""
    parts: Parts

    def sequences(self, config: Config) -> int:
        room = self.parts["keys and values"]
        return max(0, room // (self.a_token * config.seq_len)) * self.dp

    def judge(self, config: Config, problems: list[str], warnings: list[str]) -> None:
        """Say so where it cannot hold one sequence, or not a batch."""
        held, batch = self.sequences(config), config.orchestrator.batch_size
        if held == 0:
            problems.append(
                f"the {self.owner}'s engine has no room for one sequence of "
                f"{config.seq_len} tokens on GPU {', '.join(map(str, self.ids))}"
            )
            self.parts["keys and values"] = max(0, self.parts["keys and values"])
        elif held < batch:
            warnings.append(
                f"the {self.owner}'s engine holds {held} sequences of {config.seq_len} tokens: "
                f"a batch of {batch} goes through in several rounds"
            )


def _engines(
    config: Config, shape: Shape, teacher: Shape, machine: Machine, parts: Partition, size: int
) -> list[_Engine]:
    """The engines on GPUs, with what each of their GPUs holds."""
    shares = engine_share(config, parts)
    update, found = config.orchestrator.teacher_model.update, []
    adapters = 2 if update == "ema" and not parts.teacher else 1
    if parts.inference:
        tp, budget = parts.inference_tp, int(shares[0] * machine.bytes)
        needs = engine_memory(config, shape, size, tp, budget, adapters)
        engine = _Engine(
            "student", parts.inference, parts.inference_dp, shape.cache(size, tp), needs
        )
        found.append(engine)
    if parts.teacher:
        tp, budget = parts.teacher_tp, int(shares[1] * machine.bytes)
        adapters = 0 if update == "frozen" or config.separate_teacher else 1
        needs = engine_memory(config, teacher, size, tp, budget, adapters)
        a_token = teacher.cache(size, tp)
        found.append(_Engine("teacher", parts.teacher, parts.teacher_dp, a_token, needs))
    return found


def _ranks(driver: Parts, others: int) -> Parts:
    """What the trainer's processes on one machine take together."""
    return {**driver, OTHER_RANKS: others * sum(driver.values())} if others else driver


def _owned(owner: str, parts: Parts) -> Parts:
    return {f"{owner}: {name}": size for name, size in parts.items() if size}


def _overfull(devices: list[Device]) -> list[str]:
    found = []
    for device in devices:
        for phase, parts in device.phases.items():
            if (need := sum(parts.values())) > device.usable:
                found.append(
                    f"{device.name}: {phase} needs {need / GIB:.1f} GiB "
                    f"of {device.usable / GIB:.1f} usable"
                )
    return found
