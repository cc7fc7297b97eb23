"""Whether a placement fits into memory, estimated without loading any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidistill.config import Config
from minidistill.placement.choose import choose
from minidistill.placement.devices import Device, EngineOnGpus, Memory, overfull
from minidistill.placement.flops import Work, step_work
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import ModelShape, Shapes
from minidistill.placement.placement import Models, Placement, place
from minidistill.placement.throughput import Layout, Timing, step_timing


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, and whether it fits."""

    config: Config
    placement: Placement
    shape: ModelShape
    """Of the student."""
    devices: tuple[Device, ...]
    sequences: Mapping[str, int]
    """How many of the longest sequences the KV cache of each engine holds, over all replicas."""
    work: Mapping[str, Work]
    timing: Timing | None
    """None if it does not fit, and where it is not estimated: see `step_timing`."""
    problems: tuple[str, ...]
    """Why it does not fit; empty if it does."""
    warnings: tuple[str, ...]
    change: Mapping[str, Any] | None = field(default_factory=dict)
    """Settings with which it fits; None if none were found."""
    faster: tuple[Layout, ...] = ()
    """Other layouts of 4 and more GPUs that take less time, the fastest first."""

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def hours(self) -> float | None:
        """Of the run's steps alone; None if their time is not estimated."""
        return None if self.timing is None else self.timing.step * self.config.max_steps / 3600

    @property
    def gpu_hours(self) -> float | None:
        """The same, times the GPUs that the run uses, idle or not."""
        if self.timing is None or self.hours is None:
            return None
        return self.hours * len(self.timing.idle)


def estimate(config: Config, shapes: Shapes, models: Models, machine: Machine) -> Plan:
    """The plan of a configuration, with what it leaves open chosen. Raises UserError as `place`."""
    placement = choose(config, place(config, models, machine), shapes, machine)
    memory = Memory(config, placement, shapes, machine)
    problems: list[str] = []
    warnings = list(placement.warnings)
    if placement.max_length < config.seq_len and "seq_len" in config.model_fields_set:
        limit = f"{placement.max_length} tokens, the most that the model takes, are used"
        warnings.append(f"seq_len = {config.seq_len} is too long: {limit}")
    for engine in memory.engines:
        batch = config.orchestrator.batch_size
        _judge(engine, placement.max_length, batch, problems, warnings)
    devices, work = memory.devices(), step_work(config, placement, shapes)
    problems += overfull(devices)
    return Plan(
        config=config,
        placement=placement,
        shape=shapes.student,
        devices=tuple(devices),
        sequences={engine.owner: engine.sequences for engine in memory.engines},
        work=work,
        timing=None if problems else step_timing(memory, work, machine),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _judge(
    engine: EngineOnGpus, longest: int, batch: int, problems: list[str], warnings: list[str]
) -> None:
    """Report an engine that cannot hold one sequence, or not a whole batch of them."""
    held = engine.sequences
    if held == 0:
        problems.append(
            f"the {engine.owner}'s engine has no room for one sequence of "
            f"{longest} tokens on GPU {', '.join(map(str, engine.gpus))}"
        )
    elif held < batch:
        warnings.append(
            f"the {engine.owner}'s engine holds {held} sequences of {longest} tokens: "
            f"a batch of {batch} goes through in several rounds"
        )
