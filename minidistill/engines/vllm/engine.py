"""Sampling and scoring in vLLM, in a process that holds one base for both roles.

The driver imports no vLLM. Rows of the student name the adapter, rows of the frozen teacher name
none, in one engine and one batch. Every version of an adapter has a new name, because vLLM's prefix
cache is keyed by it: the base's cached context stays, a former version's is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from minidistill.engines.base import Engine, EngineCapabilities, Ids
from minidistill.engines.vllm.client import EngineProcess
from minidistill.engines.vllm.options import Options
from minidistill.engines.vllm.restart import KeptAlive, Warn
from minidistill.engines.vllm.weights_send import CHUNK_BYTES, Outbox, chunked
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

# vLLM's adapter ids. An id is kept for the run, its adapter's name changes with every version.
SLOTS = {Weights.STUDENT: 1, Weights.EMA: 2}
NAMES = {Weights.STUDENT: "student", Weights.EMA: "teacher"}
SEED_BITS = (1 << 63) - 1  # vLLM takes signed 64-bit seeds

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class VllmEngine(Engine):
    """One vLLM engine. Its process is started at once and waited for at the first call.

    A process that dies is started again, with the weights of the current version, at most
    `max_restarts` times in a run; what it was asked for is asked again.
    """

    def __init__(self, options: Options, max_restarts: int, warn: Warn) -> None:
        self.options = options
        self.name = f"vLLM {options.vllm_version}"
        self.bytes_synced = 0
        self.chunk_bytes = CHUNK_BYTES
        self._policy: Policy | None = None
        self._roles: tuple[Role, ...] = ()
        self._version: int | None = None
        self._weights: Callable[[], NamedTensors] | None = None
        self._asleep = False

        def start() -> EngineProcess:
            self._asleep = False
            return EngineProcess(options.arguments, options.environment)

        self._kept = KeptAlive(start, self._send, max_restarts, warn)

    @property
    def location(self) -> str:
        ids = self.options.gpu_ids
        return f"GPU {', '.join(map(str, ids))}" if ids else "the CPU"

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(scores_ids=self._call("scores_ids"))

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        self._policy, self._roles = policy, tuple(roles)
        gpus, workers = self.options.gpu_ids, self.options.workers
        self._outbox = Outbox(policy.dtype, policy.device, gpus, workers)

    # -- the engine ----------------------------------------------------------------------------

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
            raise UserError(
                "the model's logits are no numbers",
                where="sampling",
                fix="lower trainer.optim.lr and start again, or resume an earlier checkpoint",
                exit_code=EXIT_HEALTH,
            )
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

    def sync(self, version: int) -> None:
        """See `Engine.sync`: adapters' tensors or the whole model's, in memory."""
        assert self._policy is not None
        if not self._policy.lora and Role.STUDENT in self._roles:
            if version > 0:  # before the first step they are what vLLM has loaded
                self.sync_weights(version, self._policy.weights)
            return
        self._version = version
        if self._kept.ready:
            self._kept.ask(self._send)

    def sync_weights(self, version: int, weights: Callable[[], NamedTensors]) -> None:
        """Take over a whole model's weights, under Hugging Face's names, in bounded chunks.

        `weights` is kept: a process that is started again is sent what it then gives.
        """
        self._version, self._weights = version, weights
        if self._kept.ready:
            self._kept.ask(self._send)

    def sleep(self) -> None:
        """On a GPU shared with the trainer, leave it the memory; the next call takes it back."""
        if self.options.sleeps and self._kept.ready and not self._asleep:
            self._call("sleep")
            self._asleep = True

    def close(self) -> None:
        self._kept.close()

    def wait_until_ready(self) -> None:
        self._kept.ask(lambda: None)

    # -- its process ---------------------------------------------------------------------------

    @property
    def _process(self) -> EngineProcess:
        return self._kept.process

    @property
    def restarts(self) -> int:
        """How often its process was started again."""
        return self._kept.restarts

    def _adapter(self, role: Role) -> tuple[str, int] | None:
        """The name and the slot of the role's adapter; None where it runs the base."""
        if self._policy is None or not self.options.adapter:
            return None
        weights = self._policy.weights_of(role)
        if weights not in SLOTS:
            return None
        assert self._version is not None, "an adapter before the first sync"
        return f"{NAMES[weights]}-v{self._version}", SLOTS[weights]

    def _send(self) -> None:
        """The current weights, where the process has other ones."""
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
                entries = self._outbox.pack(self._policy.adapter(weights))
                self.bytes_synced += self._process.command(
                    "load_adapter",
                    slot=SLOTS[weights],
                    config=self.options.adapter,
                    handle=self._outbox.handle(),
                    entries=entries,
                    version=self._version,
                )

    def _send_weights(self) -> None:
        assert self._weights is not None
        self._process.command("start_update")
        batches = chunked(self._weights(), self._outbox.dtype.itemsize, self.chunk_bytes)
        batch, first = next(batches, None), True
        while batch is not None:
            entries, handle = self._outbox.pack(batch), self._outbox.handle()
            # made as they are sent: weights that are divided among ranks are whole only here
            batch = next(batches, None)
            only, first = first and batch is None, False
            self._process.command("update_weights", handle=handle, entries=entries, only=only)
            self.bytes_synced += sum(e.count for e in entries) * self._outbox.dtype.itemsize
        self._process.command("finish_update", version=self._version)  # which drops the adapters
        self._send_adapters()

    def _call(self, method: str, advance: Advance | None = None, **arguments: Any) -> Any:
        told = 0

        def ask() -> Any:
            done = 0

            def progress(count: int) -> None:
                # after a restart, what was finished before is finished again
                nonlocal done, told
                done += count
                if advance is not None and done > told:
                    advance(done - told)
                    told = done

            self._wake()
            return self._process.call(method, progress, **arguments)

        return self._kept.ask(ask)

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # of this process, for the engine to take
            self._process.call("wake")
            self._asleep = False
