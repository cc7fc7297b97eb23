"""Sampling and scoring in vLLM, in a process that holds one base for both roles.

The driver imports no vLLM. Rows of the student name the adapter, rows of the frozen teacher name
none, in one engine and one batch. Every version of an adapter has a new name, because vLLM's prefix
cache is keyed by it: the base's cached context stays, a former version's is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from minidistill.engines.base import Advance, Request
from minidistill.engines.vllm.client import EngineProcess
from minidistill.engines.vllm.options import Options
from minidistill.engines.vllm.restart import KeptAlive, Warn
from minidistill.engines.vllm.weights_send import CHUNK_BYTES, Outbox, chunked
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.trainer.policy import EMA, STUDENT, Policy, Role
from minidistill.types import Completion

SLOTS: dict[Role, int] = {STUDENT: 1, EMA: 2}  # vLLM's adapter ids; an id is kept, its name changes
NAMES: dict[Role, str] = {STUDENT: "student", EMA: "teacher"}
SEED_BITS = (1 << 63) - 1  # vLLM takes signed 64-bit seeds

Weights = Iterable[tuple[str, torch.Tensor]]


class VllmEngine:
    """One vLLM engine. Its process is started at once and waited for at the first call.

    A process that dies is started again, with the weights of the current version, at most
    `max_restarts` times in a run; what it was asked for is asked again.
    """

    def __init__(self, options: Options, max_restarts: int, warn: Warn) -> None:
        self.options = options
        self.bytes_synced = 0
        self.chunk_bytes = CHUNK_BYTES
        self._policy: Policy | None = None
        self._serves: tuple[Role, ...] = ()
        self._version: int | None = None
        self._weights: Callable[[], Weights] | None = None
        self._asleep = False

        def start() -> EngineProcess:
            self._asleep = False
            return EngineProcess(options.arguments, options.environment)

        self._kept = KeptAlive(start, self._send, max_restarts, warn)

    @property
    def description(self) -> str:
        return f"{self.name} on {self.place}"

    @property
    def name(self) -> str:
        return f"vLLM {self.options.vllm_version}"

    @property
    def place(self) -> str:
        ids = self.options.gpu_ids
        return f"GPU {', '.join(map(str, ids))}" if ids else "the CPU"

    @property
    def scores_ids(self) -> bool:
        """Whether any ids can be scored at each position, not only the tokens that are there."""
        return bool(self._call("scores_ids"))

    def attach(self, policy: Policy, serves: Sequence[Role]) -> None:
        """Name the trainer's model, whose weights under the roles served here `sync` sends."""
        self._policy, self._serves = policy, tuple(serves)
        gpus, workers = self.options.gpu_ids, self.options.workers
        self._outbox = Outbox(policy.dtype, policy.device, gpus, workers)

    # -- the engine ----------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        student: bool,
        advance: Advance | None = None,
        top_k: int = 0,
    ) -> list[Completion]:
        """See `Engine.generate`; with `top_k` completions have their `top_ids`.

        Raises UserError (exit code 4) where a log-prob is no number.
        """
        found = self._call(
            "generate",
            advance,
            prompts=[request.prompt_ids for request in requests],
            seeds=[request.seed & SEED_BITS for request in requests],
            max_tokens=max_tokens,
            temperature=temperature,
            eos_ids=sorted(self._policy.eos_ids) if self._policy else [],
            adapter=self._adapter(student),
            top_k=top_k,
        )
        completions = [Completion(*parts) for parts in found]
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
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float,
        student: bool,
    ) -> list[list[float]]:
        """See `Engine.score`. Raises ValueError for another temperature than 1."""
        return self.score_rows(prompts, completions, [student] * len(prompts), temperature)

    def score_rows(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        student: Sequence[bool],
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Both roles in one batch: each row says whether it is the student's."""
        if temperature != 1:
            raise ValueError("vLLM gives the log-probs of given tokens at temperature 1 alone")
        found = self._score(prompts, completions, [self._adapter(own) for own in student])
        return [row[:, 0].tolist() for row in found]

    def score_ids(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        ids: Sequence[Any],
        *,
        student: bool,
    ) -> list[Any]:
        """Log-probs at ids (tokens, k) at each completion token, float arrays of that shape."""
        adapters = [self._adapter(student)] * len(prompts)
        return self._score(prompts, completions, adapters, ids)

    def _score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        adapters: Sequence[Any],
        ids: Sequence[Any] | None = None,
    ) -> list[Any]:
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
        if not self._policy.lora and STUDENT in self._serves:
            if version > 0:  # before the first step they are what vLLM has loaded
                self.sync_weights(version, self._policy.weights)
            return
        self._version = version
        if self._kept.ready:
            self._kept.ask(self._send)

    def sync_weights(self, version: int, weights: Callable[[], Weights]) -> None:
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

    def wait(self) -> None:
        """Return once the engine is ready. Raises UserError (exit code 3) where it cannot be."""
        self._kept.ask(lambda: None)

    # -- its process ---------------------------------------------------------------------------

    @property
    def _process(self) -> EngineProcess:
        return self._kept.process

    @property
    def restarts(self) -> int:
        """How often its process was started again."""
        return self._kept.restarts

    def _adapter(self, student: bool) -> tuple[str, int] | None:
        if self._policy is None or not self.options.adapter:
            return None
        role = STUDENT if student else self._policy.teacher
        if role not in SLOTS:
            return None
        assert self._version is not None, "an adapter before the first sync"
        return f"{NAMES[role]}-v{self._version}", SLOTS[role]

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
        for role in dict.fromkeys(self._serves if self.options.adapter else ()):
            if role in SLOTS:
                entries = self._outbox.pack(self._policy.adapter(role))
                self.bytes_synced += self._process.command(
                    "load_adapter",
                    slot=SLOTS[role],
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
