"""Sampling and scoring in vLLM, in a process that holds one base model for both roles.

The driver does not import vLLM. In one batch the student's rows name the adapter and the frozen
teacher's rows name none. Every version of an adapter has a new name, because vLLM's prefix cache is
keyed by it: the base's cached context stays valid, and an old version's cache is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidistill.config import Config
from minidistill.engines.base import Engine, EngineCapabilities, Ids, not_finite_error
from minidistill.engines.vllm.client import EngineProcess, RestartingProcess
from minidistill.engines.vllm.options import Options, build_options
from minidistill.engines.vllm.weights_send import SendBuffer, chunked
from minidistill.placement.limits import SYNC_CHUNK_BYTES
from minidistill.placement.placement import EnginePlacement
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

# vLLM's adapter ids. They stay the same in a run, and adapters' names change with every version.
SLOTS = {Weights.STUDENT: 1, Weights.EMA: 2}
NAMES = {Weights.STUDENT: "student", Weights.EMA: "teacher"}
SEED_BITS = (1 << 63) - 1  # vLLM takes signed 64-bit seeds

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class VllmEngine(Engine):
    """One vLLM engine. Its process starts at once and is waited for at the first call.

    A dead process restarts with the current weights and the call is retried, up to `max_restarts`
    times a run.
    """

    def __init__(self, options: Options, max_restarts: int) -> None:
        self.options = options
        self.name = f"vLLM {options.vllm_version}"
        self.bytes_synced = 0
        """Bytes of weights sent to the process so far."""
        self.chunk_bytes = SYNC_CHUNK_BYTES
        """The most bytes of a chunk, when a whole model's weights are sent."""
        self._policy: Policy | None = None
        self._roles: tuple[Role, ...] = ()
        self._version: int | None = None
        self._weights: Callable[[], NamedTensors] | None = None
        self._asleep = False

        def start() -> EngineProcess:
            self._asleep = False
            return EngineProcess(options.arguments, options.environment)

        self.restarting = RestartingProcess(start, self._send, max_restarts)

    @property
    def location(self) -> str:
        ids = self.options.gpu_ids
        return f"GPU {', '.join(map(str, ids))}" if ids else "the CPU"

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(scores_ids=self._call("scores_ids"))

    @property
    def process(self) -> EngineProcess:
        """The engine's current process."""
        return self.restarting.process

    @property
    def restarts(self) -> int:
        """How often the process was restarted."""
        return self.restarting.restarts

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        self._policy, self._roles = policy, tuple(roles)
        gpus, workers = self.options.gpu_ids, self.options.workers
        self._buffer = SendBuffer(policy.dtype, policy.device, gpus, workers)

    def wait_until_ready(self) -> None:
        self.restarting.call(lambda: None)

    # -- sampling and scoring ------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
    ) -> list[Completion]:
        sampled = self._call(
            "generate",
            advance,
            prompts=[request.prompt_ids for request in requests],
            seeds=[request.seed & SEED_BITS for request in requests],
            params=params,
            eos_ids=sorted(self._policy.eos_ids) if self._policy else [],
            adapter=self._adapter(role),
        )
        completions = [Completion(*fields) for fields in sampled]
        if not all(math.isfinite(p) for c in completions for p in c.logprobs):
            raise not_finite_error()
        return completions

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        return self.score_rows(prompts, completions, [role] * len(prompts), temperature)

    def score_rows(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        roles: Sequence[Role],
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """`score` with a role for each row: student and teacher in one batch."""
        if temperature != 1:
            raise ValueError("vLLM scores given tokens at temperature 1 only")
        rows = self._score(prompts, completions, [self._adapter(role) for role in roles])
        return [row[:, 0].tolist() for row in rows]

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        adapters = [self._adapter(role)] * len(prompts)
        return self._score(prompts, completions, adapters, ids)

    def _score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        adapters: Sequence[tuple[str, int] | None],
        ids: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        return self._call(
            "score",
            prompts=[tuple(p) for p in prompts],
            completions=[tuple(c) for c in completions],
            adapters=list(adapters),
            ids=ids,
        )

    def _adapter(self, role: Role) -> tuple[str, int] | None:
        """The name and the slot of the role's adapter; None if the role runs the base."""
        if self._policy is None or not self.options.adapter:
            return None
        weights = self._policy.weights_of(role)
        if weights not in SLOTS:
            return None
        assert self._version is not None, "no adapter before the first sync"
        return f"{NAMES[weights]}-v{self._version}", SLOTS[weights]

    # -- weights -------------------------------------------------------------------------------

    def sync(self, version: int) -> None:
        """Send the adapters' tensors or the whole model's, in memory."""
        assert self._policy is not None
        if not self._policy.lora and Role.STUDENT in self._roles:
            if version > 0:  # before the first step vLLM's own copy is current
                self.sync_weights(version, self._policy.weights)
            return
        self._version = version
        if self.restarting.ready:
            self.restarting.call(self._send)

    def sync_weights(self, version: int, weights: Callable[[], NamedTensors]) -> None:
        """Send a whole model's weights, under Hugging Face's names, in bounded chunks.

        `weights` is kept, and called again if the process restarts.
        """
        self._version, self._weights = version, weights
        if self.restarting.ready:
            self.restarting.call(self._send)

    @explain_out_of_memory(
        "sending weights to vLLM",
        where="inference.gpu_memory_utilization",
        fix="give the engine a smaller share of the GPU that it shares with the trainer",
    )
    def _send(self) -> None:
        """Send the current weights to the process."""
        if self._version is None or self._policy is None:
            return
        self._wake()
        with self._policy.lock:
            if self._weights is not None:
                self._send_weights()
            else:
                self._send_adapters()

    def _send_adapters(self) -> None:
        assert self._policy is not None
        for weights in dict.fromkeys(map(self._policy.weights_of, self._roles)):
            if self.options.adapter and weights in SLOTS:
                entries = self._buffer.pack(self._policy.adapter(weights))
                self.bytes_synced += self.process.command(
                    "load_adapter",
                    slot=SLOTS[weights],
                    config=self.options.adapter,
                    handle=self._buffer.handle(),
                    entries=entries,
                    version=self._version,
                )

    def _send_weights(self) -> None:
        assert self._weights is not None
        self.process.command("start_update")
        chunks = chunked(self._weights(), self._buffer.dtype.itemsize, self.chunk_bytes)
        chunk, first = next(chunks, None), True
        while chunk is not None:
            entries, handle = self._buffer.pack(chunk), self._buffer.handle()
            # fetched only now: weights sharded over ranks are unsharded one chunk at a time
            chunk = next(chunks, None)
            only, first = first and chunk is None, False
            self.process.command("update_weights", handle=handle, entries=entries, only=only)
            self.bytes_synced += sum(e.count for e in entries) * self._buffer.dtype.itemsize
        self.process.command("finish_update", version=self._version)  # drops the adapters
        self._send_adapters()

    # -- its process ---------------------------------------------------------------------------

    def sleep(self) -> None:
        """On a GPU shared with the trainer, free its memory. The next call wakes it."""
        if self.options.sleeps and self.restarting.ready and not self._asleep:
            self._call("sleep")
            self._asleep = True

    def peak_memory(self) -> int | None:
        return self.restarting.call(lambda: self.process.command("peak_memory"))

    def close(self) -> None:
        self.restarting.close()

    def _call(self, method: str, advance: Advance | None = None, **arguments: Any) -> Any:
        reported = 0

        def call() -> Any:
            finished = 0

            def progress(count: int) -> None:
                # a retried call repeats what had finished before the restart
                nonlocal finished, reported
                finished += count
                if advance is not None and finished > reported:
                    advance(finished - reported)
                    reported = finished

            self._wake()
            return self.process.call(method, progress, **arguments)

        return self.restarting.call(call)

    def _wake(self) -> None:
        if self._asleep:
            if self._policy is not None:  # the engine needs the memory that torch caches
                self._policy.free_cached_memory()
            self.process.call("wake")
            self._asleep = False


def start(
    engine: EnginePlacement, config: Config, sync_folder: Path, *, teacher: bool
) -> list[Engine]:
    """Start the replicas' processes. Weights reach them in memory, not through `sync_folder`."""
    replicas: list[Engine] = []
    try:
        for gpus in engine.replicas:
            options = build_options(config, engine, gpus, teacher=teacher)
            replicas.append(VllmEngine(options, config.inference.max_restarts))
        if engine.gpus:  # vLLM measures free memory, which other starts would change
            for replica in replicas:
                replica.wait_until_ready()
    except BaseException:
        for replica in replicas:
            replica.close()
        raise
    return replicas
