"""The smallest change of settings with which a plan fits, found by planning again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from minidistill.config import Config
from minidistill.config.checks import contradictions
from minidistill.errors import UserError
from minidistill.placement.model_shape import Shape
from minidistill.placement.planner import Machine, Plan, lay_out

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Search:
    shape: Shape
    teacher: Shape
    machine: Machine

    def plan(self, start: Config, settings: Settings) -> Plan | None:
        """The plan with `settings`, None where they contradict others."""
        config = with_settings(start, settings)
        if next(contradictions(config), None) is not None:
            return None
        try:
            return lay_out(config, self.shape, self.teacher, self.machine)
        except UserError:
            return None


def smallest_change(plan: Plan, teacher: Shape, machine: Machine) -> Mapping[str, Any] | None:
    """Settings that make `plan` fit: the fewest, the earlier of `LEVERS` first; None if none do."""
    search = _Search(plan.shape, teacher, machine)
    for count in range(1, len(LEVERS) + 1):
        for levers in combinations(LEVERS, count):
            # how much is left to the engines depends on all the rest
            order = sorted(levers, key=lambda lever: lever is _utilization)
            for found, settings in _pull(search, plan, plan, order, {}):
                if found.fits:
                    return settings
    return None


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with settings by their dotted names; tables that are off are switched on."""
    data = config.model_dump()
    for key, value in settings.items():
        *tables, name = key.split(".")
        at = data
        for table in tables:
            at[table] = at[table] or {}
            at = at[table]
        at[name] = value
    return Config.model_validate(data)


Lever = Callable[[Plan], Iterator[Settings]]


def _pull(
    search: _Search, start: Plan, plan: Plan, levers: Sequence[Lever], settings: Settings
) -> Iterator[tuple[Plan, Settings]]:
    """Every plan that changes a setting of each lever, the smallest changes first."""
    first, *others = levers
    for more in first(plan):
        changed = settings | more
        found = search.plan(start.config, changed)
        if found is None:
            continue
        if others:
            yield from _pull(search, start, found, others, changed)
        else:
            yield found, changed


def _micro_batch(plan: Plan) -> Iterator[Settings]:
    """Half as many tokens, down to one sequence."""
    tokens = plan.config.trainer.micro_batch_tokens
    while tokens > plan.config.seq_len:
        tokens = max(tokens // 2, plan.config.seq_len)
        yield {"trainer.micro_batch_tokens": tokens}


def _checkpointing(plan: Plan) -> Iterator[Settings]:
    ac = plan.config.trainer.model.ac
    if ac is None or ac.freq > 1:
        yield {"trainer.model.ac.freq": 1}


def _utilization(plan: Plan) -> Iterator[Settings]:
    """What the trainer leaves of the GPUs that it shares with engines."""
    parts, room = plan.partition, 1.0
    if not parts.sleeps:
        return
    for device in plan.devices:
        here = device.phases.get("sampling", {})
        kept = sum(size for name, size in here.items() if name.startswith("trainer:"))
        if kept and device.id in parts.trainer:
            room = min(room, (device.usable - kept) / device.bytes)
    share = math.floor(20 * room) / 20
    tables = {"inference": parts.inference, "teacher_inference": parts.teacher}
    settings = {
        f"{table}.gpu_memory_utilization": share
        for table, ids in tables.items()
        if set(ids) & set(parts.trainer)
        and getattr(plan.config, table).gpu_memory_utilization > share
    }
    if settings and share > 0:
        yield settings


def _tensor_parallel(plan: Plan) -> Iterator[Settings]:
    """Each engine of the model over more GPUs."""
    tp = plan.partition.inference_tp
    while (tp := 2 * tp) < len(plan.devices) + 1:
        settings: Settings = {"inference.parallel.tp": tp}
        if plan.partition.teacher:
            settings["teacher_inference.parallel.tp"] = tp
        yield settings


def _ranks(plan: Plan) -> Iterator[Settings]:
    """More GPUs that train, the last ones, where none are named."""
    config, gpus = plan.config, [d.id for d in plan.devices if d.id is not None]
    named = config.inference_gpu_ids or config.teacher_gpu_ids or config.trainer_gpu_ids
    if named or config.trainer.world_size or not plan.partition.inference:
        return
    for count in range(plan.partition.ranks + 1, len(gpus)):
        if config.orchestrator.batch_size % count == 0:
            yield {"trainer_gpu_ids": gpus[-count:]}


def _divided(plan: Plan) -> Iterator[Settings]:
    """Each rank keeps a part of the base's weights."""
    if plan.partition.ranks > 1 and plan.config.trainer.shard == "auto" and not plan.sharded:
        yield {"trainer.shard": True}


def _adapter(plan: Plan) -> Iterator[Settings]:
    if plan.config.trainer.model.lora is False:
        yield {"trainer.model.lora.rank": 16}


LEVERS: tuple[Lever, ...] = (
    _micro_batch,
    _checkpointing,
    _divided,
    _utilization,
    _tensor_parallel,
    _ranks,
    _adapter,
)
