"""Real vLLM servers of the shipped model, on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from minidistill.engines.server.engine import ServerEngine
from minidistill.models.registry import resolve
from support import processes
from support.processes import Started

START_SECONDS = 300
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = (
    "--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--logprobs-mode",
    "processed_logprobs", "--lora-target-modules", *TARGETS,
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(log: Path, *flags: str, port: int | None = None) -> Iterator[tuple[str, Started]]:
    """Starts a server with the options that the CPU build needs. Yields its URL and process."""
    port = port or free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
        "--port", str(port), "--model", resolve("tiny-sokoban"), "--dtype", "float32",
        "--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill",
        "--max-num-batched-tokens", "4096", "--max-model-len", "257", "--generation-config",
        "vllm", "--kv-cache-memory-bytes", str(64 << 20), *flags,
    ]  # fmt: skip
    environment = {
        "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        # the model in the engine's process: one process less to start, and no reader that spins
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    sockets = tempfile.TemporaryDirectory()  # a killed server leaves them
    with log.open("wb") as output:
        process = processes.start(command, output, **environment, VLLM_RPC_BASE_PATH=sockets.name)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(f"{url}/health", trust_env=False)
                break
            except httpx.TransportError:
                alive = process.poll() is None
                assert alive, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield url, process
    finally:
        with suppress(ProcessLookupError):  # its engine is in the same process group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        sockets.cleanup()


def engine_at(url: str, folder: Path, min_length: int = 257, max_restarts: int = 0) -> ServerEngine:
    where, command = "inference.server_urls", "vllm serve M"
    return ServerEngine(url, where, command, min_length, folder, max_restarts, 1800.0)


def adapters_at(url: str) -> list[str]:
    """The names of the adapters loaded on a server."""
    cards = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    return [card["id"] for card in cards if card.get("parent")]


def answered_requests(url: str) -> int:
    """The number of requests that a server has answered."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    counters = [line for line in lines if line.startswith("vllm:request_success_total")]
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in counters))
