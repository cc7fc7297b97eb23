"""Several engines with the same weights, as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minidistill.engines.base import Advance, Request
from minidistill.engines.server.engine import ServerEngine
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.trainer.batching import share_out
from minidistill.trainer.policy import Policy, Role
from minidistill.types import Completion

Replica = VllmEngine | ServerEngine


class Replicas:
    """Prompts are shared out longest first, each to the replica with the least to do.

    Samples of one prompt stay together, for its prefix is cached where it was read. What is drawn
    does not depend on the replica: seeds belong to requests.
    """

    def __init__(self, engines: Sequence[Replica]) -> None:
        self.engines = list(engines)
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="replica")

    @property
    def description(self) -> str:
        places = sorted({engine.place for engine in self.engines})
        return f"{len(self.engines)} × {self.engines[0].name} on {' and '.join(places)}"

    @property
    def scores_ids(self) -> bool:
        return all(engine.scores_ids for engine in self.engines)

    def attach(self, policy: Policy, serves: Sequence[Role]) -> None:
        for engine in self.engines:
            engine.attach(policy, serves)

    def wait(self) -> None:
        self._each(lambda engine: engine.wait())

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
        """See `VllmEngine.generate`."""
        lock = threading.Lock()

        def progress(count: int) -> None:
            with lock:
                if advance is not None:
                    advance(count)

        def ask(engine: Replica, rows: Sequence[int]) -> list[Completion]:
            return engine.generate(
                [requests[i] for i in rows],
                max_tokens=max_tokens,
                temperature=temperature,
                student=student,
                advance=progress,
                top_k=top_k,
            )

        prompts = [r.prompt_ids for r in requests]
        return self._shared(prompts, [len(p) + max_tokens for p in prompts], ask)

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float,
        student: bool,
    ) -> list[list[float]]:
        """See `Engine.score`."""

        def ask(engine: Replica, rows: Sequence[int]) -> list[list[float]]:
            return engine.score(
                [prompts[i] for i in rows],
                [completions[i] for i in rows],
                temperature=temperature,
                student=student,
            )

        return self._shared(prompts, _lengths(prompts, completions), ask)

    def score_ids(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        ids: Sequence[Any],
        *,
        student: bool,
    ) -> list[Any]:
        """See `VllmEngine.score_ids`."""

        def ask(engine: Any, rows: Sequence[int]) -> list[Any]:
            mine = ([whole[i] for i in rows] for whole in (prompts, completions, ids))
            return engine.score_ids(*mine, student=student)

        return self._shared(prompts, _lengths(prompts, completions), ask)

    def sync(self, version: int) -> None:
        """All replicas take over the weights at once; each reads its own handles."""
        self._each(lambda engine: engine.sync(version))

    def sleep(self) -> None:
        self._each(lambda engine: engine.sleep())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._threads.shutdown(wait=True)

    def _each(self, act: Callable[[Replica], Any]) -> None:
        for done in [self._threads.submit(act, engine) for engine in self.engines]:
            done.result()

    def _shared(
        self,
        prompts: Sequence[Sequence[int]],
        costs: Sequence[int],
        ask: Callable[[Replica, Sequence[int]], Sequence[Any]],
    ) -> list[Any]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(tuple(prompt), []).append(index)
        together = list(groups.values())
        shares = share_out([sum(costs[i] for i in g) for g in together], len(self.engines))
        rows = [sorted(i for g in share for i in together[g]) for share in shares]
        asked = [
            (part, self._threads.submit(ask, engine, part))
            for engine, part in zip(self.engines, rows, strict=True)
            if part
        ]
        found: dict[int, Any] = {}
        for part, done in asked:
            found.update(zip(part, done.result(), strict=True))
        return [found[i] for i in range(len(prompts))]


def _lengths(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> list[int]:
    return [len(x) + len(y) for x, y in zip(a, b, strict=True)]
