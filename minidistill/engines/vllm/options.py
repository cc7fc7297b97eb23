"""The options that vLLM is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.config import Config
from minidistill.config.schema import SILENCE, LoraConfig, SilenceConfig
from minidistill.models.auto import (
    is_multimodal,
    is_recurrent,
    matches,
    skeleton,
    text_linears,
)
from minidistill.models.registry import resolve
from minidistill.placement import vllm_version
from minidistill.placement.limits import (
    CPU_BLOCK,
    LORA_RANKS,
    MAX_SEQUENCES,
    cpu_cache_bytes,
    kv_bytes_per_token,
)
from minidistill.placement.model_shape import largest_rank
from minidistill.placement.placement import EnginePlacement

BATCH_TOKENS = 4096  # prefilled at a time on a CPU
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Options:
    """The options of an engine's process."""

    arguments: dict[str, Any]
    environment: dict[str, str]
    adapter: dict[str, Any]
    gpu_ids: tuple[int, ...]
    vllm_version: str
    sleeps: bool = False
    """Whether it shares GPUs with the trainer and sleeps between its calls."""
    silence: SilenceConfig = SILENCE
    """How long it may show no progress."""

    @property
    def workers(self) -> int:
        """vLLM's worker processes, each with a shard of the model."""
        return int(self.arguments["tensor_parallel_size"])


def build_options(
    config: Config, engine: EnginePlacement, gpus: Sequence[int], *, teacher: bool
) -> Options:
    """The options of one replica of the student's engine, or of the `teacher`'s separate one.

    `gpus` are the replica's; there are none on a CPU. Raises UserError if vLLM is missing.
    """
    version = vllm_version.require(on_gpu=bool(gpus))
    model = engine.model_config
    arguments: dict[str, Any] = {
        "model": resolve(engine.model),
        "revision": config.model.revision if engine.model == config.model.name else None,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": engine.dtype,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # ignores the sampling defaults of the model's files
        "max_model_len": engine.max_length,
        "max_num_seqs": MAX_SEQUENCES,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        # the student's k most likely tokens, and the one it sampled
        "max_logprobs": config.trainer.loss.top_k + 1,
        "worker_extension_cls": "minidistill.engines.vllm.weights_receive.Receiver",
        "weight_transfer_config": {"backend": "minidistill"},
        "seed": config.seed,
        "tensor_parallel_size": engine.tp,
    }
    if is_multimodal(model):
        arguments["language_model_only"] = True
    adapter: dict[str, Any] = {}
    adapters = adapter_options(config, model, teacher=teacher)
    if adapters and (lora := config.trainer.model.lora):
        targets = adapters["lora_target_modules"]
        adapter = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": targets,
            "use_rslora": lora.use_rslora,
            "rank_pattern": lora.rank_pattern,
        }
        arguments |= adapters
    environment = {
        # the engine runs in a separate process already; a nested one would double its start-up
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    }
    if gpus:
        arguments |= {
            "device_ids": list(gpus),
            "gpu_memory_utilization": engine.memory_share,
            "enable_sleep_mode": engine.sleeps,
        }
    else:
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cpu_cache_bytes(
                kv_bytes_per_token(model, ITEMSIZES[engine.dtype]), engine.max_length
            ),
            # with small blocks a group's samples share more of their prompt; vLLM's CPU kernels
            # are slow at prefill with an adapter
            "block_size": CPU_BLOCK,
            # chunked prefill rewinds a seeded generator by its offset; CPU generators have none
            "enable_chunked_prefill": False,
            # without it vLLM cannot cache the states of recurrent layers
            "enable_prefix_caching": not is_recurrent(model),
            "max_num_batched_tokens": max(BATCH_TOKENS, arguments["max_model_len"]),
        }
        # compiling takes longer than small models run
        environment["TORCHDYNAMO_DISABLE"] = "1"
        if engine.tp > 1:
            # workers bound to cores need one NUMA node each
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Options(
        arguments, environment, adapter, tuple(gpus), version, engine.sleeps, config.silence
    )


def adapter_options(config: Config, model: Any, *, teacher: bool) -> dict[str, Any]:
    """vLLM's arguments for adapters; empty if an engine of `model` serves none."""
    lora, update = config.trainer.model.lora, config.orchestrator.teacher_model.update
    if not lora or (teacher and update == "frozen"):  # a frozen teacher is the base alone
        return {}
    return {
        "enable_lora": True,
        "max_lora_rank": min(rank for rank in LORA_RANKS if rank >= largest_rank(lora)),
        "max_loras": 2 if update == "ema" else 1,
        # not the head: on a CPU, scoring fails if the head may have an adapter
        "lora_target_modules": _targets(lora, model),
    }


def _targets(lora: LoraConfig, model: Any) -> list[str]:
    """The last parts of the names of the layers that get an adapter.

    vLLM knows a layer by the last part of its name, or by its own full name, which is another one
    where it fuses layers. So it makes room for adapters in more layers than have one if a target
    names only some of those with that last part.
    """
    names = [name for name, _ in text_linears(skeleton(model))]
    if lora.target_modules != "all-linear":
        names = [n for n in names if any(matches(n, target) for target in lora.target_modules)]
    return sorted({name.rpartition(".")[2] for name in names})
