"""The configuration: top level, trainer and engines.

To add a setting, add a field. The docstring below it becomes its help in docs/configuration.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from minidistill.config.engine_kinds import ENGINE_KINDS
from minidistill.config.health import HealthConfig
from minidistill.config.orchestrator import OrchestratorConfig
from minidistill.estimators import ESTIMATORS

Rank = Annotated[int, Ge(1), Le(512)]

if TYPE_CHECKING:
    EngineName = str
    EstimatorName = str
else:  # type checkers cannot read the registries
    EngineName = Literal["auto", *ENGINE_KINDS]
    EstimatorName = Literal["auto", *ESTIMATORS]


class ModelConfig(Table):
    """The model to train. Without its adapter it is by default also the teacher."""

    name: Text = "tiny-sokoban"
    """A built-in model's name, a local directory, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is bfloat16 on a GPU that supports it, else float32."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the frozen base in 4 bit (bitsandbytes, on a GPU, with the embedded engine) and
    computes in `dtype`. A teacher that is another model is not quantized."""
    attn: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of the trainer. `varlen` packs sequences without a mask and computes
    each prompt once, on a GPU in 16 bit with torch's flash kernel. `auto` is `varlen` if the model
    attends to all earlier tokens, else transformers' default. `flash_attention_2` needs the package
    flash-attn."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model."""
    chat_template: Text | None = None
    """A file with a Jinja chat template to use instead of the model's own, relative to the TOML
    file that names it. When the configuration is loaded, this becomes the file's text."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the chat template, the same for both views: `enable_thinking = false` keeps
    Qwen3 from thinking. What the template does not read is refused."""
    special_tokens_in_text: Literal["text", "allow"] = "text"
    """How `<|im_end|>` and other control tokens within the context and the prompts are encoded: as
    `text`, or with `allow` as the tokens themselves, which can end a turn."""


class CkptConfig(Table):
    """Checkpoints: adapter, optimizer and counters, enough for `--resume`."""

    interval: Count = 50
    """Steps between checkpoints; one is always written at the end, and with 0 only that one."""
    keep: Positive = 2
    """How many of the latest checkpoints to keep on disk."""
    best: Literal["heldout_kl", "reward"] | None = None
    """Choose the weights of the best evaluation, and not those of the last step: of the lowest KL
    to the teacher on held-out prompts, or of the highest mean reward. Its checkpoint is kept
    besides the latest. It needs `[orchestrator.eval]`. A resumed run may leave it out."""


class EarlyStoppingConfig(Table):
    """End the run if evaluations show no progress; off unless the table is present
    (`--early_stopping`). The weights are those of the last step unless `ckpt.best` is set. A
    resumed run may have other settings here."""

    metric: Literal["heldout_kl", "reward"] = "heldout_kl"
    """What has to get better: the KL to the teacher on held-out prompts, or the mean reward."""
    patience: Positive = 3
    """Evaluations in a row (`orchestrator.eval.interval`) without progress that end the run."""
    min_delta: Weight = 0.0
    """Progress is a change of more than this, from the last evaluation that was progress."""


class WandbConfig(Table):
    """Weights & Biases; off unless the table is present (`--wandb`, `--no-wandb`)."""

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


class TensorboardConfig(Table):
    """TensorBoard's event files in the run's directory; off unless the table is present
    (`--tensorboard`)."""

    flush_seconds: PositiveFloat = 10.0
    """How long events may wait before they are on disk."""


class TrackioConfig(Table):
    """trackio, which keeps runs on this machine; off unless the table is present (`--trackio`)."""

    project: Text = "minidistill"
    """Project to log to."""
    name: Text | None = None
    """Name of the run, to which an id is added; by default the output directory's."""


class LoraConfig(Table):
    """The adapter that is trained."""

    init: Text | None = None
    """An adapter to start from: a PEFT folder, or another run's directory. The settings of its
    shape (rank, alpha, target_modules, use_rslora, use_dora, rank_pattern) are taken from it."""
    rank: Rank = 16
    """Rank of the update. Ranks 4 to 64 closed 95 to 96% of the gap (docs/how-to-choose.md)."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: it is multiplied by alpha / rank."""
    use_rslora: bool = False
    """Multiply the update by alpha / √rank instead: its size does not fall with the rank.
    At rank 64, with the learning rate that suits alpha / rank, it closed half as much of the
    gap."""
    use_dora: bool = False
    """Train the norm of each row of a weight besides its direction (DoRA). Only with the
    embedded engine: vLLM cannot serve it."""
    rank_pattern: dict[str, Rank] = Field(default={})
    """Other ranks for some layers, by a module's name or by the end of it; regular expressions are
    allowed. The first that matches counts."""
    dropout: Decay = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | Annotated[list[Text], MinLen(1)] = "all-linear"
    """Layers that get an adapter: all linear layers except the head, or a list of their names."""
    dtype: Literal["auto", "float32", "base"] = "auto"
    """Number format in which the adapter computes: `base` is the base model's. The optimizer keeps
    fp32 copies of the weights in any case. `auto` is `base` for a bfloat16 model on a GPU, else
    `float32`."""


class AcConfig(Table):
    """Activation checkpointing: less memory, more compute."""

    freq: Positive = 1
    """Checkpoint every n-th layer."""


class TrainerModelConfig(Table):
    """How the trainer holds the model."""

    impl: Literal["auto", "hf"] = "auto"
    """Model implementation; both values mean the one in transformers."""
    lora: LoraConfig | Literal[False] = LoraConfig()
    """`false` (`--no-trainer.model.lora`) trains every weight of the model instead."""
    ac: AcConfig | Literal[False] | Literal["auto"] = "auto"
    """`auto` recomputes activations if they do not fit otherwise, the table
    (`--trainer.model.ac`) always, and `false` (`--no-trainer.model.ac`) never."""


ADAPTER_LR, EVERY_WEIGHT_LR = 5e-4, 5e-5
"""What `optim.lr = "auto"` stands for."""


class OptimConfig(Table):
    """The optimizer."""

    type: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: Literal["auto"] | PositiveFloat = "auto"
    """Peak learning rate. `auto` is 5e-4 for an adapter and 5e-5 for full fine-tuning. 2e-3 worked
    for adapters of models of 0.9 M and 135 M parameters (docs/how-to-choose.md)."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay."""
    betas1: Decay = 0.9
    """Decay of the running mean of the gradient."""
    betas2: Decay = 0.999
    """Decay of the running mean of the squared gradient."""
    max_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class SchedulerConfig(Table):
    """The learning rate over the run."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Positive | None = None
    """Steps of decay; by default the rest of the run."""
    min_lr: Weight = 0.0
    """Learning rate at the end of the decay."""


class LossConfig(Table):
    """The objective: adv_tau * A + teacher_tau * log q - student_tau * log π, per token."""

    adv_tau: Weight = 0.5
    """Weight of the advantage of the task reward. With 0.5 for all three, as much of the gap closed
    as with the teacher alone (docs/how-to-choose.md)."""
    teacher_tau: Weight = 0.5
    """Weight of the teacher's log-probability (distillation)."""
    student_tau: Weight = 0.5
    """Weight of the student's log-probability (entropy bonus)."""
    estimator: EstimatorName = "auto"
    """How the log-probability terms become a gradient: from the sampled token, from the full
    distribution, or from the top k tokens and a bucket for the rest. `auto` is `full` if the
    teacher runs in the trainer, else `sampled`, which learned more slowly (docs/how-to-choose.md).
    `sft` is the cross-entropy on the teacher's samples times `teacher_tau`: it needs
    `orchestrator.sample_from = "teacher"`, and the other taus at 0."""
    top_k: Positive = 64
    """How many tokens the `top_k` estimator keeps. With a vocabulary of 642 tokens, 8 and 64 closed
    at most two points less of the gap than `full`."""
    ratio_clip_high: Annotated[float, Ge(1)] = 2.0
    """Upper bound of the ratio of trainer and sampler probability; higher ones are truncated."""
    token_mask_low: Annotated[float, Ge(0), Lt(1)] = 0.125
    """Tokens with a lower ratio are left out of the loss, and counted."""
    token_mask_high: Annotated[float, Gt(1)] = 8.0
    """Tokens with a higher ratio are left out of the loss, and counted."""
    kl_clip: Literal["auto", "off"] | PositiveFloat = "auto"
    """Clip of the distillation term of a token; `auto` is 5.0 with `sampled`, else off."""
    max_sampler_mismatch: Literal["auto", "off"] | PositiveFloat = "auto"
    """The run stops if `kl/sampler_mismatch` is higher: the sampler then has other weights. `auto`
    is 1e-6 in float32, 0.01 in bfloat16 and float16, and off with adapter dropout or `async`."""


class TrainerConfig(Table):
    """The trainer."""

    micro_batch_tokens: Literal["auto"] | Positive = "auto"
    """Tokens in one forward pass, padding included. Fewer need less memory and give the same
    result. `auto` is the most that fit, up to 16384, and on a CPU up to 1024 or one group."""
    packing: Literal["auto"] | bool = "auto"
    """Put several sequences in one row instead of padding. `auto` does if the attention needs no
    mask for it (`varlen`, `flash_attention_2`); prompts are then computed once."""
    world_size: Positive | None = None
    """Training processes (ranks); by default one for each GPU of the trainer, and 1 on a CPU."""
    shard: Literal["auto"] | bool = "auto"
    """Shard the weights across the ranks (FSDP2) instead of replicating them; `auto` does if every
    weight is trained. Each rank first loads the whole model."""
    model: TrainerModelConfig = TrainerModelConfig()
    optim: OptimConfig = OptimConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    loss: LossConfig = LossConfig()

    @property
    def peak_lr(self) -> float:
        """`optim.lr`, or what `auto` stands for: decision 0026 says where it is from."""
        if self.optim.lr != "auto":
            return self.optim.lr
        return ADAPTER_LR if self.model.lora else EVERY_WEIGHT_LR


class ParallelConfig(Table):
    """Parallelism of the engine: dp replicas of tp GPUs each."""

    tp: Positive = 1
    """GPUs that share one replica of the model."""
    dp: Positive | None = None
    """Replicas; by default as many as fit on the GPUs."""


class EngineConfig(Table):
    """An engine on GPUs."""

    parallel: ParallelConfig = ParallelConfig()
    gpu_memory_utilization: Literal["auto"] | Fraction = "auto"
    """Share of each GPU's memory that the engine may use. `auto` is what the trainer leaves on GPUs
    that they share, and at most 0.9."""
    server_urls: Urls | None = None
    """URLs of running vLLM servers to use instead, on this machine or others: see
    `docs/servers.md`. Several share the work. The API key is read from `VLLM_API_KEY`."""


class TeacherInferenceModelConfig(Table):
    """The teacher's model, if it is not the student's base model."""

    name: Text | None = None
    """A model with the student's tokenizer; by default the student's base model."""


class TeacherInferenceConfig(EngineConfig):
    """The teacher's engine, if it is not the student's."""

    model: TeacherInferenceModelConfig = TeacherInferenceModelConfig()
    share: bool | None = None
    """Whether one engine serves student and teacher, with the adapter on and off. By default one
    does on up to 3 GPUs; on more, each has its own."""


class InferenceConfig(EngineConfig):
    """The engine that samples."""

    engine: EngineName = "auto"
    """`embedded` samples with the trainer's model, `vllm` in its own process; `auto` is `vllm` if
    there are a GPU and a supported vLLM, else `embedded`."""
    max_restarts: Count = 2
    """How many times in a run a vLLM process that died is restarted, or a server that does not
    answer is waited for."""


class SilenceConfig(Table):
    """How long a process or a server that the run waits for may show no progress. That is said
    after a minute. At the limit the run ends with exit code 3."""

    load: PositiveFloat = 3600.0
    """Seconds that vLLM, or a rank of the trainer, may take to start and to load its model."""
    step: PositiveFloat = 1800.0
    """Seconds after that without a sign: a step of vLLM, an answer of a server, a micro-batch or a
    collective of the trainer's ranks, weights that were taken over."""


SILENCE = SilenceConfig()
"""The default limits."""


class Config(Table):
    """A run of minidistill."""

    max_steps: Positive = 100
    """Optimizer steps."""
    seq_len: Annotated[int, Ge(2)] = 2048
    """Longest context + prompt + completion, in tokens."""
    output_dir: Text | None = None
    """The run's directory; by default `runs/<name of the first configuration file>`."""
    seed: Count = 0
    """Seed of all randomness."""
    schedule: Literal["sync", "async"] = "sync"
    """`sync` trains on rollouts of the current weights, where it can on the first groups while
    others are sampled, and is exactly reproducible. `async` samples the rollouts of the next step
    with vLLM while this one trains: they are at most one update old."""
    inference_gpu_ids: GpuIds | None = None
    """GPUs of the engine that samples; by default chosen from those of the machine."""
    teacher_gpu_ids: GpuIds | None = None
    """GPUs of the teacher's engine."""
    trainer_gpu_ids: GpuIds | None = None
    """GPUs of the trainer."""
    model: ModelConfig = ModelConfig()
    ckpt: CkptConfig = CkptConfig()
    early_stopping: EarlyStoppingConfig | None = None
    silence: SilenceConfig = SILENCE
    health: HealthConfig = HealthConfig()
    wandb: WandbConfig | None = None
    tensorboard: TensorboardConfig | None = None
    trackio: TrackioConfig | None = None
    trainer: TrainerConfig = TrainerConfig()
    orchestrator: OrchestratorConfig
    inference: InferenceConfig = InferenceConfig()
    teacher_inference: TeacherInferenceConfig = TeacherInferenceConfig()

    @property
    def separate_teacher(self) -> str | None:
        """The teacher's model if it is not the student's base model, else None."""
        name = self.teacher_inference.model.name
        return None if name == self.model.name else name
