"""Several engines with the same weights as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from minidistill.engines.base import Engine, EngineCapabilities, Ids
from minidistill.trainer.batching import share_out
from minidistill.trainer.policy import Policy
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

T = TypeVar("T")


class Replicas(Engine):
    """Divides a batch among its engines: longest prompts first, each to the least loaded engine.

    Samples of one prompt stay together, because the prompt's prefix is cached where it was read.
    What is drawn does not depend on the engine: seeds belong to requests.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.name = f"{len(self.engines)} × {self.engines[0].name}"
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="replica")

    @property
    def location(self) -> str:
        return " and ".join(sorted({engine.location for engine in self.engines}))

    @property
    def capabilities(self) -> EngineCapabilities:
        replicas = [engine.capabilities for engine in self.engines]
        return EngineCapabilities(
            scores_at_any_temperature=all(r.scores_at_any_temperature for r in replicas),
            scores_ids=all(r.scores_ids for r in replicas),
        )

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        for engine in self.engines:
            engine.attach(policy, roles)

    def wait_until_ready(self) -> None:
        self._on_each(lambda engine: engine.wait_until_ready())

    def verify(self, trainer: Engine, temperature: float | None) -> None:
        for engine in self.engines:
            engine.verify(trainer, temperature)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
    ) -> list[Completion]:
        lock = threading.Lock()

        def locked_advance(count: int) -> None:
            with lock:
                if advance is not None:
                    advance(count)

        def generate(engine: Engine, rows: Sequence[int]) -> list[Completion]:
            return engine.generate([requests[i] for i in rows], params, role, locked_advance)

        prompts = [r.prompt_ids for r in requests]
        return self._divided(prompts, [len(p) + params.max_tokens for p in prompts], generate)

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        def score(engine: Engine, rows: Sequence[int]) -> list[list[float]]:
            part = [prompts[i] for i in rows], [completions[i] for i in rows]
            return engine.score(*part, role, temperature)

        return self._divided(prompts, _lengths(prompts, completions), score)

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        def score_ids(engine: Engine, rows: Sequence[int]) -> list[np.ndarray]:
            part = [prompts[i] for i in rows], [completions[i] for i in rows]
            return engine.score_ids(*part, [ids[i] for i in rows], role)

        return self._divided(prompts, _lengths(prompts, completions), score_ids)

    def sync(self, version: int) -> None:
        """All replicas take over the weights at once; each reads its own handles."""
        self._on_each(lambda engine: engine.sync(version))

    def sleep(self) -> None:
        self._on_each(lambda engine: engine.sleep())

    def peak_memory(self) -> int | None:
        return max((p for e in self.engines if (p := e.peak_memory()) is not None), default=None)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._threads.shutdown(wait=True)

    def _on_each(self, act: Callable[[Engine], None]) -> None:
        for future in [self._threads.submit(act, engine) for engine in self.engines]:
            future.result()

    def _divided(
        self,
        prompts: Sequence[Ids],
        costs: Sequence[int],
        call: Callable[[Engine, Sequence[int]], Sequence[T]],
    ) -> list[T]:
        """The results of `call` on each engine with its share of the rows, in the rows' order."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(tuple(prompt), []).append(index)
        groups = list(by_prompt.values())
        shares = share_out([sum(costs[i] for i in g) for g in groups], len(self.engines))
        rows = [sorted(i for g in share for i in groups[g]) for share in shares]
        futures = [
            (part, self._threads.submit(call, engine, part))
            for engine, part in zip(self.engines, rows, strict=True)
            if part
        ]
        results: dict[int, T] = {}
        for part, future in futures:
            results.update(zip(part, future.result(), strict=True))
        return [results[i] for i in range(len(prompts))]


def _lengths(a: Sequence[Ids], b: Sequence[Ids]) -> list[int]:
    return [len(x) + len(y) for x, y in zip(a, b, strict=True)]
