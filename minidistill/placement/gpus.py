"""Dividing a machine's GPUs among sampling, scoring and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.config import Config
from minidistill.config.schema import ParallelConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.teacher import TeacherPlacement

Ids = tuple[int, ...]
KEYS = ("inference_gpu_ids", "teacher_gpu_ids", "trainer_gpu_ids")
MOST_OF_A_GPU = 0.9
"""The share of a GPU's memory that engines take if nothing else needs it."""
ALL_SHARE = "to share GPUs, name the same ones in each list"


@dataclass(frozen=True, slots=True)
class GpuLayout:
    """GPU ids by role. All are empty on a machine without GPUs."""

    inference: Ids
    """The student's engine; empty where the trainer itself samples."""
    teacher: Ids
    """The teacher's own engine; empty where it shares the student's or is in the trainer."""
    trainer: Ids
    warnings: tuple[str, ...] = ()


def lay_out_gpus(
    config: Config,
    gpus: int,
    teacher: TeacherPlacement,
    heads: int,
    *,
    engine_on_gpus: bool,
) -> GpuLayout:
    """Divide GPUs 0 to `gpus` - 1 among the student's engine, the teacher's and the trainer.

    Lists from the configuration are used as they are. Of the remaining GPUs the trainer gets half
    (as many as divide the batch) and the engines the other half, each in multiples of its tp. A
    single GPU is shared by all. `heads` is the number of the model's attention heads.
    `engine_on_gpus`: the student samples with its own engine on this machine.

    Raises UserError for impossible layouts: exit code 3 for missing GPUs, otherwise 2.
    """
    _check_ids(config, gpus)
    processes = (gpus == 0 and config.trainer.world_size) or 1
    check_ranks(config, processes, "processes", "trainer.world_size")
    if not engine_on_gpus:
        trainer, warnings = _trainer_only(config, gpus)
        return GpuLayout((), (), trainer, tuple(warnings))
    own_teacher = _teacher_has_engine(config, gpus, teacher)
    _check_heads(config, heads, own_teacher)
    if gpus == 0:
        return GpuLayout((), (), ())
    warnings = []
    student, teacher_gpus, trainer = _divide(config, gpus, own_teacher, warnings)
    check_ranks(config, len(trainer))
    if config.trainer_gpu_ids and {*student, *teacher_gpus} & set(trainer) and gpus > 1:
        warnings.append("engines and trainer share GPUs: the engines sleep while it trains")
    if teacher_gpus and set(student) & set(teacher_gpus):
        warnings.append(f"two engines share GPU {_list(student)}: its memory is split between them")
    return GpuLayout(student, teacher_gpus, trainer, tuple(warnings))


def memory_shares(config: Config, layout: GpuLayout) -> tuple[float, float]:
    """The shares of a GPU's memory that the student's and the teacher's engine may take at most.

    As configured, or half of that each if both are on the same GPUs.
    """
    split = 2 if set(layout.inference) & set(layout.teacher) else 1
    student, teacher = (
        MOST_OF_A_GPU if setting == "auto" else setting
        for setting in (
            config.inference.gpu_memory_utilization,
            config.teacher_inference.gpu_memory_utilization,
        )
    )
    return student / split, teacher / split


def _teacher_has_engine(config: Config, gpus: int, teacher: TeacherPlacement) -> bool:
    """Whether the teacher gets its own engine on this machine's GPUs or CPU.

    Raises UserError for settings that contradict that.
    """
    teacher_ids, student_ids = config.teacher_gpu_ids, config.inference_gpu_ids
    share = config.teacher_inference.share
    if teacher.scorer == "trainer":
        if teacher_ids is not None and set(teacher_ids) != set(config.trainer_gpu_ids or ()):
            raise UserError(
                f"teacher_gpu_ids = {teacher_ids}, but the teacher runs in the trainer: "
                f"{teacher.reason}",
                where="teacher_gpu_ids, trainer.loss.estimator",
                fix='leave teacher_gpu_ids out, or set trainer.loss.estimator = "sampled"',
            )
        return False
    if config.teacher_inference.server_urls:
        return False
    same = teacher_ids is not None and set(teacher_ids) == set(student_ids or ())
    if share and teacher_ids is not None and not same:
        raise UserError(
            f"teacher_gpu_ids = {teacher_ids} gives the teacher an engine of its own, "
            "teacher_inference.share = true does not",
            where="teacher_gpu_ids, teacher_inference.share",
            fix="leave one of them out",
        )
    if share and teacher.needs_own_engine:
        raise UserError(
            "teacher_inference.share = true, but the student's engine cannot serve this teacher",
            where="teacher_inference.share",
            fix="leave it out, or train an adapter and let the base be the teacher",
        )
    return teacher.needs_own_engine or (gpus >= 4 and share is not True and not same)


def _divide(
    config: Config, gpus: int, own_teacher: bool, warnings: list[str]
) -> tuple[Ids, Ids, Ids]:
    """GPUs of the student's engine, the teacher's and the trainer."""
    first, second = config.inference.parallel, config.teacher_inference.parallel
    named = [getattr(config, key) for key in KEYS]
    student, teacher, trainer = (None if ids is None else tuple(ids) for ids in named)
    teacher = teacher if own_teacher else ()
    if gpus == 1:
        _check_room("inference", first, 1)
        if own_teacher:
            _check_room("teacher_inference", second, 1)
        return student or (0,), (0,) if own_teacher else (), trainer or (0,)
    taken = {id for ids in named for id in ids or ()}
    free = [id for id in range(gpus) if id not in taken]
    if student and teacher is None and len(free) < _least(second) + (trainer is None):
        # too few are left for a separate engine
        teacher = student if len(student) % _least(second) == 0 else None
    missing = [p for p, ids in ((first, student), (second, teacher)) if ids is None]
    count = 0
    if trainer is None:
        count = _trainer_count(config, gpus, len(free), [_least(p) for p in missing])
    rest = len(free) - count
    if student is None:
        _check_room("inference", first, rest)
    if teacher is None:
        _check_room("teacher_inference", second, rest)
    rooms, shared = (rest, rest), False
    if len(missing) == 2:
        shared = rest < _least(first) + _least(second)
        if not shared:
            half = min(max(rest // 2, _least(second)), rest - _least(first))
            rooms = rest - half, half
    idle = bool(missing) or trainer is None
    at = 0
    if student is None:
        student = tuple(free[: _most(first, rooms[0])])
        at = len(student)
    if teacher is None:
        start = 0 if shared else at
        teacher = tuple(free[start : start + _most(second, rooms[1])])
        at = max(at, start + len(teacher))
    if trainer is None:
        trainer = tuple(free[at : at + count])
        at += count
    if idle and free[at:]:
        warnings.append(f"GPU {_list(free[at:])} stays idle")
    return student, teacher, trainer


def _trainer_only(config: Config, gpus: int) -> tuple[Ids, list[str]]:
    """The trainer's GPUs if no engine of the student needs any, and warnings."""
    named = {key: ids for key in KEYS if (ids := getattr(config, key)) is not None}
    trainer = config.trainer_gpu_ids or next(iter(named.values()), None)
    if trainer is None:
        count = _dividing(config.orchestrator.batch_size, gpus)
        idle = [*range(count, gpus)]
        return tuple(range(count)), [f"GPU {_list(idle)} stays idle"] if idle else []
    for key, ids in named.items():
        if set(ids) != set(trainer):
            raise UserError(
                f"{key} = {ids}, but the embedded engine is the trainer's own model",
                where=f"{key}, inference.engine",
                fix=f'leave {key} out, or set inference.engine = "vllm"',
            )
    check_ranks(config, len(trainer))
    return tuple(trainer), []


def _trainer_count(config: Config, gpus: int, free: int, needs: Sequence[int]) -> int:
    """How many GPUs the trainer gets if none are named: up to half of the machine.

    `needs` are the fewest GPUs of each engine without named ones. If there are too few for separate
    engines, the engines share GPUs.
    """
    for_engines = sum(needs) if free > sum(needs) else max(needs, default=0)
    most = min(free - for_engines, -(-gpus // 2)) if needs else free
    count = _dividing(config.orchestrator.batch_size, most)
    if count == 0:
        raise UserError(
            f"of the machine's {gpus} GPUs {free} are not named, and none is left for the trainer",
            where=", ".join(KEYS),
            fix=f"name fewer, or lower parallel.tp or parallel.dp; {ALL_SHARE}",
        )
    return count


def _dividing(batch: int, most: int) -> int:
    """The largest number of ranks, up to `most`, that divides the batch; 0 if there is none."""
    return next((count for count in range(most, 0, -1) if batch % count == 0), 0)


def _least(parallel: ParallelConfig) -> int:
    """The fewest GPUs that an engine can have."""
    return parallel.tp * (parallel.dp or 1)


def _most(parallel: ParallelConfig, room: int) -> int:
    """How many of `room` GPUs an engine takes."""
    return parallel.tp * (parallel.dp or room // parallel.tp)


def _check_room(table: str, parallel: ParallelConfig, room: int) -> None:
    need = _least(parallel)
    if need > room:
        whose = "teacher" if table.startswith("teacher") else "student"
        raise UserError(
            f"the {whose}'s engine needs {need} GPUs (dp {parallel.dp or 1} × tp {parallel.tp}), "
            f"and {room} {'is' if room == 1 else 'are'} left for it",
            where=f"{table}.parallel.tp, {table}.parallel.dp, {', '.join(KEYS)}",
            fix=f"lower {table}.parallel, or name the GPUs; {ALL_SHARE}",
        )


def _check_ids(config: Config, gpus: int) -> None:
    for key in KEYS:
        missing = [id for id in getattr(config, key) or () if id >= gpus]
        if missing:
            raise UserError(
                f"{key} names GPU {_list(missing)}, the machine has {gpus}",
                where=key,
                fix=f"use 0 to {gpus - 1}" if gpus else f"leave {key} out to run on the CPU",
                exit_code=EXIT_ENVIRONMENT,
            )


def check_schedule(config: Config, *, separate_engine: bool, sleeps: bool) -> None:
    """Raise UserError for `async` without an engine that samples while the trainer works.

    `sleeps`: the engine gives its GPUs to the trainer meanwhile.
    """
    if config.schedule == "async" and (not separate_engine or sleeps):
        why = "they take turns on the same GPU" if separate_engine else "the trainer itself samples"
        other = "give both GPUs of their own" if separate_engine else 'inference.engine = "vllm"'
        if not separate_engine and config.orchestrator.sample_from == "teacher":
            other += ' and an adapter, or trainer.loss.estimator = "sampled"'
            other = f"let an engine have the teacher's weights: {other}"
        raise UserError(
            'schedule = "async" needs an engine that samples while the trainer works, '
            f"and here {why}",
            where="schedule",
            fix=f'set schedule = "sync", or {other}',
        )


def _check_heads(config: Config, heads: int, own_teacher: bool) -> None:
    tables = {"inference": config.inference.parallel}
    if own_teacher and config.separate_teacher is None:
        tables["teacher_inference"] = config.teacher_inference.parallel
    for table, parallel in tables.items():
        if heads % parallel.tp:
            fits = [tp for tp in range(1, parallel.tp) if heads % tp == 0]
            raise UserError(
                f"{table}.parallel.tp = {parallel.tp} does not divide "
                f"the model's {heads} attention heads",
                where=f"{table}.parallel.tp",
                fix=f"set it to {fits[-1]}",
            )


def check_ranks(
    config: Config, count: int, what: str = "GPUs", key: str = "trainer_gpu_ids"
) -> None:
    """Raise UserError if `count` ranks of the trainer do not divide a batch."""
    batch = config.orchestrator.batch_size
    if batch % count:
        raise UserError(
            f"the trainer's {count} {what} do not divide orchestrator.batch_size = {batch}",
            where=f"{key}, orchestrator.batch_size",
            fix=f"take {_dividing(batch, count)} {what}, or a batch_size that {count} divides",
        )


def _list(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
