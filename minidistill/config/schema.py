"""The configuration: top level, trainer and engines. A docstring under a field is its help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Field

from minidistill.config.base import (
    Count,
    Decay,
    Fraction,
    GpuIds,
    Positive,
    PositiveFloat,
    Table,
    Text,
    Urls,
    Weight,
)
from minidistill.config.orchestrator import OrchestratorConfig
from minidistill.estimators import ESTIMATORS

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal["auto", *ESTIMATORS]


class ModelConfig(Table):
    """The model: student and teacher are the same one, with and without the adapter."""

    name: Text = "tiny-sokoban"
    """A built-in model's name, a local directory, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' dtype; `auto` is bfloat16 on a GPU that has it and float32 on a CPU."""
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of the trainer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose author you trust."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model."""


class CkptConfig(Table):
    """Checkpoints: adapter, optimizer and counters, enough for `--resume`."""

    interval: Count = 50
    """Steps between checkpoints; 0 writes only the one at the end, which is always written."""
    keep: Positive = 2
    """How many of the latest checkpoints stay on disk."""


class WandbConfig(Table):
    """Weights & Biases; off unless the table is there (`--wandb`, `--no-wandb`)."""

    project: Text = "minidistill"
    """Project to log to."""
    name: Text | None = None
    """Name of the run; by default the output directory's."""
    entity: Text | None = None
    """Team or user that owns the project."""
    tags: list[Text] = Field(default=[])
    """Labels of the run."""
    offline: bool = False
    """Keep the log on disk for a later `wandb sync`."""


class LoraConfig(Table):
    """The adapter that is trained."""

    rank: Annotated[int, Ge(1), Le(512)] = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: Decay = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | Annotated[list[Text], MinLen(1)] = "all-linear"
    """Layers that get an adapter: every linear one but the head, or a list of module names."""


class AcConfig(Table):
    """Activation checkpointing: less memory for more compute; off unless the table is there."""

    freq: Positive = 1
    """Checkpoint every freq-th layer."""


class TrainerModelConfig(Table):
    """How the trainer holds the model."""

    impl: Literal["auto", "hf"] = "auto"
    """Model implementation; both values mean transformers."""
    lora: LoraConfig | Literal[False] = LoraConfig()
    """`false` (`--no-trainer.model.lora`) trains every weight of the model instead."""
    ac: AcConfig | None = None


class OptimConfig(Table):
    """The optimizer."""

    type: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay."""
    betas1: Decay = 0.9
    """Decay of the gradient's running mean."""
    betas2: Decay = 0.999
    """Decay of the squared gradient's running mean."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class SchedulerConfig(Table):
    """The learning rate over the run."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Positive | None = None
    """Steps of decay; by default the rest of the run."""
    min_lr: Weight = 0.0
    """Where the decay ends."""


class LossConfig(Table):
    """The objective: adv_tau * A + teacher_tau * log q - student_tau * log π, per token."""

    adv_tau: Weight = 0.5
    """Weight of the task reward's advantage."""
    teacher_tau: Weight = 0.5
    """Weight of the teacher's log-probability (distillation)."""
    student_tau: Weight = 0.5
    """Weight of the student's log-probability (entropy bonus)."""
    estimator: EstimatorName = "auto"
    """How the log-probability terms become a gradient: from the sampled token, the full
    distribution, or the top k and a bucket for the rest. `auto` is `full` where the teacher runs
    in the trainer, else `sampled`."""
    top_k: Positive = 64
    """Tokens kept by `top_k`."""
    ratio_clip_high: Annotated[float, Ge(1)] = 2.0
    """The trainer / sampler ratio is truncated here."""
    token_mask_low: Annotated[float, Ge(0), Lt(1)] = 0.125
    """Tokens whose ratio is below are left out of the loss, and counted."""
    token_mask_high: Annotated[float, Gt(1)] = 8.0
    """Tokens whose ratio is above are left out of the loss, and counted."""
    kl_clip: Literal["auto", "off"] | PositiveFloat = "auto"
    """Clip of one token's distillation term; `auto` is 5.0 with `sampled` and off otherwise."""
    max_sampler_mismatch: Literal["auto", "off"] | PositiveFloat = "auto"
    """The run stops where `kl/sampler_mismatch` is above: the sampler runs other weights. `auto` is
    1e-6 in float32, 0.01 in bfloat16 and float16, and off with adapter dropout or `async`."""


class TrainerConfig(Table):
    """The trainer."""

    micro_batch_tokens: Positive = 16384
    """Padded tokens in one forward pass. Less of it needs less memory; the result is the same."""
    packing: bool = False
    """Put several sequences in one row instead of padding."""
    world_size: Positive | None = None
    """Processes that train together; by default one a GPU of the trainer, on a CPU 1."""
    shard: Literal["auto"] | bool = "auto"
    """Divide the weights among the ranks (FSDP2) instead of holding all of them on each; `auto`
    where every weight is trained. Each rank loads the whole model first."""
    model: TrainerModelConfig = TrainerModelConfig()
    optim: OptimConfig = OptimConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    loss: LossConfig = LossConfig()


class ParallelConfig(Table):
    """Engines over GPUs: dp replicas of tp GPUs each."""

    tp: Positive = 1
    """GPUs that share one replica of the model."""
    dp: Positive | None = None
    """Replicas; by default as many as the GPUs allow."""


class EngineConfig(Table):
    """An engine on GPUs."""

    parallel: ParallelConfig = ParallelConfig()
    gpu_memory_utilization: Fraction = 0.9
    """Share of each GPU's memory that the engine may take."""
    server_urls: Urls | None = None
    """vLLM servers to use instead, started by somebody else, here or on other machines: see
    `docs/servers.md`. Several share the work. An API key is taken from `VLLM_API_KEY`."""


class TeacherInferenceModelConfig(Table):
    """The teacher's model, where it is not the student's base."""

    name: Text | None = None
    """A model with the student's tokenizer; by default the teacher is the student's own base."""


class TeacherInferenceConfig(EngineConfig):
    """The teacher's engine, where it is not the student's."""

    model: TeacherInferenceModelConfig = TeacherInferenceModelConfig()
    share: bool | None = None
    """Whether student and teacher are served by one engine, adapter on and off. By default they
    are on up to 3 GPUs, and have engines of their own on more."""


class InferenceConfig(EngineConfig):
    """The engine that samples."""

    engine: Literal["auto", "embedded", "vllm"] = "auto"
    """`embedded` samples with the trainer's own weights, `vllm` in a process of its own; `auto` is
    `vllm` where there is a GPU and a vLLM that fits, else `embedded`."""
    max_restarts: Count = 2
    """How often in a run vLLM's process is started again after it died, or a server that has gone
    away is waited for."""


class Config(Table):
    """A run of minidistill."""

    max_steps: Positive = 100
    """Optimizer steps."""
    seq_len: Annotated[int, Ge(2)] = 2048
    """Longest context + prompt + completion, in tokens."""
    output_dir: Text | None = None
    """The run's directory; by default `runs/<name of the first configuration file>`."""
    seed: Count = 0
    """Seed of everything random."""
    schedule: Literal["sync", "async"] = "sync"
    """`sync` samples, then trains, and is exactly reproducible. `async` samples the next step's
    rollouts with vLLM while this one is trained on: they are up to one update old."""
    inference_gpu_ids: GpuIds | None = None
    """GPUs that sample; by default chosen from what the machine has."""
    teacher_gpu_ids: GpuIds | None = None
    """GPUs of the teacher's engine."""
    trainer_gpu_ids: GpuIds | None = None
    """GPUs of the trainer."""
    model: ModelConfig = ModelConfig()
    ckpt: CkptConfig = CkptConfig()
    wandb: WandbConfig | None = None
    trainer: TrainerConfig = TrainerConfig()
    orchestrator: OrchestratorConfig
    inference: InferenceConfig = InferenceConfig()
    teacher_inference: TeacherInferenceConfig = TeacherInferenceConfig()

    @property
    def separate_teacher(self) -> str | None:
        """The teacher's model where it is not the student's base, else None."""
        name = self.teacher_inference.model.name
        return None if name == self.model.name else name
