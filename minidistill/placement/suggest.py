"""The smallest change of settings with which a plan fits, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from minidistill.config import Config
from minidistill.config.checks import contradictions
from minidistill.config.schema import AcConfig, EngineConfig
from minidistill.errors import UserError
from minidistill.placement.estimate import Plan, estimate
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Models

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Search:
    """Plans with other settings for the same models and machine."""

    shapes: Shapes
    models: Models
    machine: Machine

    def plan(self, start: Config, settings: Settings) -> Plan | None:
        """The plan with `settings`; None if they contradict others or cannot be placed."""
        config = with_settings(start, settings)
        if next(contradictions(config), None) is not None:
            return None
        try:
            return estimate(config, self.shapes, self.models, self.machine)
        except UserError:
            return None


def smallest_change(
    plan: Plan, shapes: Shapes, models: Models, machine: Machine
) -> Mapping[str, Any] | None:
    """The fewest settings that make `plan` fit, earlier `LEVERS` first; None if there are none."""
    search = Search(shapes, models, machine)
    for count in range(1, len(LEVERS) + 1):
        for levers in combinations(LEVERS, count):
            for candidate, settings in _pull(search, plan, plan, levers, {}):
                if candidate.fits:
                    return settings
    return None


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with settings by their dotted keys. Tables that are off are switched on."""
    data = config.model_dump()
    for key, value in settings.items():
        *tables, name = key.split(".")
        at = data
        for table in tables:
            at[table] = at[table] if isinstance(at[table], dict) else {}
            at = at[table]
        at[name] = value
    return Config.model_validate(data)


Lever = Callable[[Plan], Iterator[Settings]]


def _pull(
    search: Search, start: Plan, plan: Plan, levers: Sequence[Lever], settings: Settings
) -> Iterator[tuple[Plan, Settings]]:
    """Every plan with one change by each lever, smallest changes first."""
    first, *others = levers
    for change in first(plan):
        changed = settings | change
        candidate = search.plan(start.config, changed)
        if candidate is None:
            continue
        if others:
            yield from _pull(search, start, candidate, others, changed)
        else:
            yield candidate, changed


def _micro_batch(plan: Plan) -> Iterator[Settings]:
    """Halve the tokens that are set, down to one sequence."""
    tokens = plan.config.trainer.micro_batch_tokens
    while tokens != "auto" and tokens > plan.placement.max_length:
        tokens = max(tokens // 2, plan.placement.max_length)
        yield {"trainer.micro_batch_tokens": tokens}


def _checkpointing(plan: Plan) -> Iterator[Settings]:
    ac = plan.config.trainer.model.ac
    if ac is False or (isinstance(ac, AcConfig) and ac.freq > 1):
        yield {"trainer.model.ac.freq": 1}


def _utilization(plan: Plan) -> Iterator[Settings]:
    """Choose the share of engines that have one set."""
    engines = {"inference": plan.placement.student.gpus, "teacher_inference": _teacher_gpus(plan)}
    settings: Settings = {
        f"{table}.gpu_memory_utilization": "auto"
        for table, gpus in engines.items()
        if gpus and getattr(plan.config, table).gpu_memory_utilization != "auto"
    }
    if settings:
        yield settings


def _tensor_parallel(plan: Plan) -> Iterator[Settings]:
    """Split each engine over more GPUs."""
    tp = plan.placement.student.tp
    while (tp := 2 * tp) < len(plan.devices) + 1:
        settings: Settings = {"inference.parallel.tp": tp}
        if _teacher_gpus(plan):
            settings["teacher_inference.parallel.tp"] = tp
        yield settings


def _ranks(plan: Plan) -> Iterator[Settings]:
    """Train on more GPUs, the last ones, if the configuration names none."""
    config, gpus = plan.config, [d.id for d in plan.devices if d.id is not None]
    named = config.inference_gpu_ids or config.teacher_gpu_ids or config.trainer_gpu_ids
    if named or config.trainer.world_size or not plan.placement.student.gpus:
        return
    for count in range(plan.placement.ranks + 1, len(gpus)):
        if config.orchestrator.batch_size % count == 0:
            yield {"trainer_gpu_ids": gpus[-count:]}


def _shard(plan: Plan) -> Iterator[Settings]:
    """Shard the base's weights over the ranks."""
    placement, config = plan.placement, plan.config
    can_shard = config.trainer.shard == "auto" and config.model.quantization is None
    if placement.ranks > 1 and can_shard and not placement.sharded:
        yield {"trainer.shard": True}


def _adapter(plan: Plan) -> Iterator[Settings]:
    if plan.config.trainer.model.lora is False:
        yield {"trainer.model.lora.rank": 16}


def _embedded(plan: Plan) -> Iterator[Settings]:
    """Sample with the trainer's own weights, if no engine is configured."""
    config = plan.config
    engines = config.inference, config.teacher_inference
    default = all(
        engine.parallel == EngineConfig().parallel and engine.gpu_memory_utilization == "auto"
        for engine in engines
    )
    if default and config.inference.engine == "auto" and plan.placement.student.gpus:
        yield {"inference.engine": "embedded"}


def _teacher_gpus(plan: Plan) -> tuple[int, ...]:
    engine = plan.placement.teacher_engine
    return () if engine is None else engine.gpus


LEVERS: tuple[Lever, ...] = (
    _micro_batch,
    _checkpointing,
    _shard,
    _utilization,
    _tensor_parallel,
    _ranks,
    _embedded,
    _adapter,
)
