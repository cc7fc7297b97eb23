"""vLLM servers as users start them, and a random adapter for them to serve."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.models.auto import skeleton
from minidistill.placement.limits import CPU_BLOCK, LORA_RANKS
from minidistill.system.subprocesses import Subprocess

# What `vllm serve` runs. That command itself does not start with vLLM's CPU build.
SERVER = "vllm.entrypoints.openai.api_server"
START_SECONDS = 900.0  # a large model may be loaded from a slow disk
BASE, ADAPTER = "base", "adapter"  # the names of the models that requests ask for
LEAST_CHANGE = 1e-3  # nats; rounding explains less
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than small models run
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # the model in the engine's process, and no process that spins while it waits
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
CPU_FLAGS = ("--enforce-eager", "--block-size", str(CPU_BLOCK))
# vLLM's own functions for adapters on a CPU are many times slower than their products
CPU_ADAPTER_FLAGS = (
    "--worker-extension-cls",
    "minidistill.engines.vllm.weights_receive.Receiver",
)
# The size of the cache is given, so this is only what must be free at the start. Three servers
# share a GPU.
GPU_FLAGS = ("--gpu-memory-utilization", "0.1")


class Server:
    """A server on a free port of this machine."""

    def __init__(
        self, model: str, flags: Sequence[str], cache_bytes: int, longest: int, gpu: bool
    ) -> None:
        """Start it. `cache_bytes` is the size of the cache, `longest` the longest sequence."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            *("--model", model, "--served-model-name", BASE),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(longest)),
            *("--kv-cache-memory-bytes", str(cache_bytes), "--generation-config", "vllm"),
            "--enable-prompt-tokens-details",
            *(GPU_FLAGS if gpu else CPU_FLAGS),
            *flags,
        ]
        environment = ENVIRONMENT | ({} if gpu else CPU_ENVIRONMENT)
        self._process = Subprocess(SERVER, self.command, (), environment)

    def wait_until_ready(self) -> None:
        """Raises UserError (exit code 3) if the server does not start."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.popen.poll() is not None:
                self._fail(self._process.exit_report()[1])
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self._fail(f"not ready after {START_SECONDS:g} s{self._process.last_words()}")

    def _fail(self, why: str) -> None:
        raise UserError(
            f"vLLM's server did not start: {why}",
            where=f"python -m {SERVER} {' '.join(self.command)}",
            fix="run that command to see all of its output",
            exit_code=EXIT_ENVIRONMENT,
        )

    def close(self) -> None:
        self._process.close()


def adapter_flags(folder: Path, *, gpu: bool) -> list[str]:
    """The flags with which a server serves an adapter. Raises UserError if there is none."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        rank = next(rank for rank in LORA_RANKS if rank >= largest)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"no LoRA adapter that vLLM serves: {type(error).__name__}: {error}",
            where=f"--adapter {folder}",
            fix="give a folder of peft's, such as a run's `adapter`",
        ) from error
    flags = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    flags += ["--lora-modules", f"{ADAPTER}={folder}"]
    return flags if gpu else [*flags, *CPU_ADAPTER_FLAGS]


def random_adapter(model_config: Any, rank: int, folder: Path) -> None:
    """Write a peft adapter of all linear layers with small random weights.

    It costs what any other adapter costs, and makes the model neither better nor worse by design.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(skeleton(model_config), lora, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        # A keeps the size of its input, B makes that small
        name: torch.randn(weight.shape, generator=generator)
        * (weight.shape[1] ** -0.5 if "lora_A" in name else 0.01)
        for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.inference_mode = True
    lora.save_pretrained(str(folder))


def check_adapter(url: str, prompt: Sequence[int]) -> None:
    """Raise UserError (exit code 1) unless the adapter changes the most likely next tokens."""

    def logprobs(model: str) -> dict[str, float]:
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
        body |= {"logprobs": 5, "return_tokens_as_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=600)
        answer.raise_for_status()
        top: dict[str, float] = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        return top

    base, adapted = logprobs(BASE), logprobs(ADAPTER)
    change = max((abs(base[id] - adapted[id]) for id in base.keys() & adapted), default=math.inf)
    if not change >= LEAST_CHANGE:
        raise UserError(
            f"the adapter changes nothing: log-probs differ by {change:.2g} nats",
            where="--adapter",
            fix="give one that was trained",
            exit_code=EXIT_FAILED,
        )
