"""What runs where: computed once, frozen, and read by everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minidistill.config import Config, LoadedConfig
from minidistill.config.engine_kinds import ENGINE_KINDS, SERVER, EngineKind
from minidistill.config.schema import AcConfig, EngineConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.attention import TRANSFORMERS_CHOICE, Attention, place_attention
from minidistill.placement.gpus import (
    GpuLayout,
    Ids,
    check_ranks,
    check_schedule,
    lay_out_gpus,
    memory_shares,
)
from minidistill.placement.limits import MICRO_BATCH_TOKENS, longest_sequence
from minidistill.placement.machine import Machine
from minidistill.placement.teacher import TeacherPlacement, place_teacher
from minidistill.placement.vllm_limits import adapter_obstacle, model_obstacle

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Models:
    """The configurations of the student's and the teacher's model, as transformers reads them."""

    student: Any
    teacher: Any
    """The student's, unless the teacher is another model."""


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """An engine with its replicas."""

    kind: EngineKind
    model: str
    """The name of the model that it runs."""
    model_config: Any
    gpus: Ids = ()
    """Of all replicas. Empty on a CPU, for servers and for the trainer's own model."""
    tp: int = 1
    dp: int = 1
    """Replicas."""
    memory_share: float = 0.0
    """Of each GPU's memory."""
    sleeps: bool = False
    """It gives its GPUs' memory to the trainer between its calls."""
    urls: tuple[str, ...] = ()
    """Of running servers, if the kind is a server."""
    dtype: str = "float32"
    reason: str = ""
    """Why it is another engine than the one that `auto` prefers on this machine."""
    max_length: int = 0
    """Tokens that a sequence may have. Scoring needs one more than the run's longest sequence."""

    @property
    def in_trainer(self) -> bool:
        """The trainer's own model serves as the engine."""
        return self.kind.in_trainer

    @property
    def replicas(self) -> tuple[Ids, ...]:
        """The GPUs of each replica."""
        if not self.gpus:
            return ((),) * self.dp
        return tuple(self.gpus[i : i + self.tp] for i in range(0, len(self.gpus), self.tp))


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting of memory, as it was chosen or set, for people."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """What runs where, and why."""

    student: EnginePlacement
    teacher: TeacherPlacement
    teacher_engine: EnginePlacement | None
    """The teacher's own engine. None: the teacher is in the trainer or in the student's engine."""
    trainer_gpus: Ids
    """On this machine. Empty on a CPU."""
    ranks: int
    """Processes of the trainer, on all machines."""
    sharded: bool
    """Each rank holds a shard of the weights, not all of them."""
    dtype: str
    """Of the base weights."""
    adapter_dtype: str | None
    """In which the adapter computes. None if every weight is trained."""
    max_length: int
    """Tokens that context, prompt and completion may have together: `seq_len`, or the limit of the
    student's or the teacher's model if that is lower."""
    attention: Attention = TRANSFORMERS_CHOICE
    """Of the trainer."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Tokens in one forward pass of the trainer, padding included."""
    ac_freq: int = 0
    """Activations of every n-th layer are recomputed; 0: of none."""
    choices: tuple[Choice, ...] = ()
    """The settings of memory, as chosen or as set."""
    warnings: tuple[str, ...] = ()

    @property
    def devices(self) -> list[torch.device]:
        """The device of each rank on this machine, the driver's first.

        Each rank holds the trained model and a teacher that is scored in the trainer. The driver's
        model also samples if the engine is the embedded one.
        """
        import torch

        if not self.trainer_gpus:
            return [torch.device("cpu")] * self.ranks
        return [torch.device("cuda", gpu) for gpu in self.trainer_gpus]

    @property
    def sleeps(self) -> bool:
        """Some engine shares GPUs with the trainer and sleeps while it trains."""
        engines = (self.student, self.teacher_engine)
        return any(engine.sleeps for engine in engines if engine is not None)

    @property
    def teacher_text(self) -> str:
        """Where the teacher is scored, in words."""
        if self.teacher.scorer == "trainer":
            return f"in the trainer: {self.teacher.reason}"
        if self.teacher_engine is None:
            return "in the student's engine"
        return "on a server of its own" if self.teacher_engine.urls else "in an engine of its own"

    def with_teacher_in_trainer(self, config: Config) -> Placement:
        """The placement if the student's engine turns out not to score chosen ids."""
        teacher = place_teacher(config, separate_engine=True, scores_ids=False)
        return replace(self, teacher=teacher, teacher_engine=None)


def place(config: Config, models: Models, machine: Machine) -> Placement:
    """Place a run on a machine.

    Settings of memory that are "auto" have the values that a large machine allows:
    `choose` lowers them to what fits.

    Raises UserError for settings that cannot be placed: exit code 3 for missing GPUs, otherwise 2.
    """
    _check_quantization(config, machine)
    adapter = adapter_obstacle(config, models.student)
    obstacle = adapter or model_obstacle(models.student, machine)
    kind = student_kind(config, machine, vllm=obstacle is None)
    separate = not kind.in_trainer
    if adapter is not None and (separate or _teacher_servers_have_adapter(config)):
        raise adapter
    teacher = place_teacher(config, separate_engine=separate, scores_ids=machine.gpus > 0)
    heads = models.student.get_text_config().num_attention_heads
    layout = lay_out_gpus(config, machine.gpus, teacher, heads, engine_on_gpus=kind.on_run_gpus)
    max_length = min(
        longest_sequence(model, config.seq_len) for model in (models.student, models.teacher)
    )
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if machine.bf16 else "float32"
    student, teacher_engine = _engines(config, models, kind, teacher, layout, dtype, max_length)
    for engine in filter(None, (student, teacher_engine)):
        error = model_obstacle(engine.model_config, machine) if engine.kind.on_run_gpus else None
        if error is not None:
            raise error
    sleeps = student.sleeps or (teacher_engine is not None and teacher_engine.sleeps)
    beside = sampling_engine(config, student, teacher_engine) is not None
    check_schedule(config, separate_engine=beside, sleeps=sleeps)
    ranks = _ranks(config, machine, layout.trainer)
    shard = config.trainer.shard
    both = models.student, models.teacher  # an engine's teacher may yet move to the trainer
    warnings = layout.warnings
    if obstacle is not None and machine.vllm and config.inference.engine == "auto":
        student = replace(student, reason=obstacle.what)
        warnings = (*warnings, f"the embedded engine samples: {obstacle.what}")
    trainer, ac = config.trainer, config.trainer.model.ac
    tokens = trainer.micro_batch_tokens
    return Placement(
        student=student,
        teacher=teacher,
        teacher_engine=teacher_engine,
        trainer_gpus=layout.trainer,
        ranks=ranks,
        sharded=ranks > 1 and (not config.trainer.model.lora if shard == "auto" else shard),
        dtype=dtype,
        adapter_dtype=_adapter_dtype(config, dtype, on_gpu=bool(layout.trainer)),
        max_length=max_length,
        attention=place_attention(config, both, machine, dtype, max_length),
        micro_batch_tokens=MICRO_BATCH_TOKENS if tokens == "auto" else tokens,
        ac_freq=ac.freq if isinstance(ac, AcConfig) else 0,
        warnings=warnings,
    )


def student_kind(config: Config, machine: Machine, *, vllm: bool) -> EngineKind:
    """What the student samples with. `vllm` says whether vLLM can serve it."""
    if config.inference.server_urls:
        return SERVER
    name = config.inference.engine
    if name == "auto":
        name = "vllm" if machine.vllm and vllm else "embedded"
    return ENGINE_KINDS[name]


def _teacher_servers_have_adapter(config: Config) -> bool:
    changes = config.orchestrator.teacher_model.update != "frozen"
    return bool(config.teacher_inference.server_urls) and changes


def sampling_engine(
    config: Config, student: EnginePlacement, teacher_engine: EnginePlacement | None
) -> EnginePlacement | None:
    """The engine whose completions are trained on; None if the trainer's own model samples them."""
    engine: EnginePlacement | None = student
    if config.orchestrator.sample_from == "teacher":
        live = config.orchestrator.teacher_model.update == "live"
        in_students = config.separate_teacher is None and (config.trainer.model.lora or live)
        engine = teacher_engine or (student if in_students else None)
    return None if engine is None or engine.in_trainer else engine


def _check_quantization(config: Config, machine: Machine) -> None:
    """Raise UserError (exit code 3) if this machine cannot run a 4-bit model."""
    if config.model.quantization is None:
        return
    what, fix = "", ""
    if not machine.gpus:
        what, fix = "runs on NVIDIA GPUs only, and there is none", "leave out model.quantization"
    elif not machine.bitsandbytes:
        what = "needs the package bitsandbytes, which is not installed"
        fix = "pip install 'minidistill[nf4]'"
    if what:
        raise UserError(
            f'model.quantization = "{config.model.quantization}" {what}',
            where="model.quantization",
            fix=fix,
            exit_code=EXIT_ENVIRONMENT,
        )


def _engines(
    config: Config,
    models: Models,
    kind: EngineKind,
    teacher: TeacherPlacement,
    layout: GpuLayout,
    dtype: str,
    max_length: int,
) -> tuple[EnginePlacement, EnginePlacement | None]:
    shares = memory_shares(config, layout)

    def engine(
        kind: EngineKind, table: EngineConfig, name: str, model: Any, gpus: Ids, share: float
    ) -> EnginePlacement:
        tp = table.parallel.tp
        return EnginePlacement(
            kind=kind,
            model=name,
            model_config=model,
            gpus=gpus,
            tp=tp,
            dp=len(gpus) // tp if gpus else table.parallel.dp or 1,
            memory_share=share,
            sleeps=bool(set(gpus) & set(layout.trainer)),
            urls=tuple(table.server_urls or ()),
            dtype=dtype,
            max_length=longest_sequence(model, max_length + 1),
        )

    name = config.model.name
    student = engine(kind, config.inference, name, models.student, layout.inference, shares[0])
    table = config.teacher_inference
    on_cpu = kind.on_run_gpus and not layout.trainer
    if not (table.server_urls or layout.teacher or (on_cpu and teacher.needs_own_engine)):
        return student, None
    teacher_engine = engine(
        SERVER if table.server_urls else kind,
        table,
        config.separate_teacher or name,
        models.teacher,
        layout.teacher,
        shares[1],
    )
    return student, teacher_engine


def _adapter_dtype(config: Config, dtype: str, *, on_gpu: bool) -> str | None:
    """float16 gradients underflow without a scaled loss, so `auto` avoids them."""
    lora = config.trainer.model.lora
    if lora is False:
        return None
    in_base_dtype = lora.dtype == "base" or (
        lora.dtype == "auto" and on_gpu and dtype == "bfloat16"
    )
    return dtype if in_base_dtype else "float32"


def _ranks(config: Config, machine: Machine, trainer: Ids) -> int:
    if machine.torchrun_ranks > 1:
        return machine.torchrun_ranks
    return len(trainer) or (config.trainer.world_size or 1)


def check_settings(loaded: LoadedConfig, placement: Placement, machine: Machine) -> None:
    """Raise UserError for settings that the run would ignore, and for numbers of ranks that
    contradict each other."""
    _check_engine_settings(loaded, placement)
    _check_ranks(loaded, placement, machine)


def _check_engine_settings(loaded: LoadedConfig, placement: Placement) -> None:
    tables = "inference", "teacher_inference"
    reason = "the run samples with the embedded engine, which is the trainer's own model"
    where = ""
    if placement.student.in_trainer:
        where = origins(loaded, sum(map(_gpu_settings, tables), ()))
    engine = placement.teacher_engine
    if not where and (engine is None or engine.urls):
        reason = "the teacher has no engine of its own"
        where = origins(loaded, _gpu_settings("teacher_inference"))
    if not where and not placement.trainer_gpus:
        reason = "there is no GPU"
        where = origins(loaded, tuple(_gpu_settings(table)[1] for table in tables))
    if where:
        raise UserError(
            f"these settings are for engines that the run does not have: {reason}",
            where=where,
            fix="leave these settings out",
        )


def _gpu_settings(table: str) -> tuple[str, str]:
    return f"{table}.parallel.", f"{table}.gpu_memory_utilization"


def _check_ranks(loaded: LoadedConfig, placement: Placement, machine: Machine) -> None:
    config, gpus = loaded.config, placement.trainer_gpus
    world_size, torchrun = config.trainer.world_size, machine.torchrun_ranks > 1
    if world_size not in (None, placement.ranks):
        source = (
            f"torchrun starts {machine.torchrun_ranks} processes"
            if torchrun
            else ("1 GPU trains" if len(gpus) == 1 else f"{len(gpus)} GPUs train")
        )
        raise UserError(
            f"trainer.world_size = {world_size}, but {source}",
            where=origins(loaded, ("trainer.world_size", "trainer_gpu_ids")),
            fix="leave trainer.world_size out, or name as many GPUs in trainer_gpu_ids",
        )
    if torchrun and gpus and len(gpus) != machine.torchrun_local_ranks:
        raise UserError(
            f"torchrun starts {machine.torchrun_local_ranks} processes on this machine, "
            f"and {len(gpus)} GPUs train",
            where=origins(loaded, ("trainer_gpu_ids",)),
            fix=f"start one for each GPU: --nproc-per-node {len(gpus)}",
        )
    check_ranks(config, placement.ranks, "ranks", "trainer.world_size")


def origins(loaded: LoadedConfig, prefixes: tuple[str, ...]) -> str:
    """Where settings under these keys were made; empty if none was."""
    origins = {
        f"{key} ({origin})"
        for key, origin in loaded.provenance.items()
        if origin != "default" and key.startswith(prefixes)
    }
    return "; ".join(sorted(origins))
