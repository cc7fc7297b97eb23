"""Several engines with the same weights as one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np

from minidistill.engines.base import Engine, EngineCapabilities, Finished, Ids, Sampled
from minidistill.trainer.batching import share_out
from minidistill.trainer.policy import Policy
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

T = TypeVar("T")


class Replicas(Engine):
    """Distributes a batch over its engines: longest prompts first, each to the least loaded engine.

    Samples of one prompt go to one engine, which caches the prompt. What is drawn does not depend
    on the engine, because seeds belong to requests.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.name = f"{len(self.engines)} × {self.engines[0].name}"
        self._threads = ThreadPoolExecutor(
            2 * len(self.engines),  # for two calls at a time: one samples, one scores
            thread_name_prefix="replica",
        )

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

    @property
    def streams(self) -> bool:
        return all(engine.streams for engine in self.engines)

    @property
    def ends_in_order(self) -> bool:
        return all(engine.ends_in_order for engine in self.engines)

    @property
    def sleeps(self) -> bool:
        return any(engine.sleeps for engine in self.engines)

    @property
    def scores_while_sampling(self) -> bool:
        return all(engine.scores_while_sampling for engine in self.engines)

    @property
    def score_counts(self) -> tuple[int, int]:
        return add_counts(self.engines)

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
        finished: Finished | None = None,
    ) -> list[Completion]:
        prompts = [r.prompt_ids for r in requests]
        shares = self._shares(prompts, [len(p) + params.max_tokens for p in prompts])
        merged = None
        if finished is not None:
            merged = _Merged([e for e, rows in shares if rows], self.ends_in_order, finished)
        lock = threading.Lock()

        def locked_advance(count: int) -> None:
            with lock:
                if advance is not None:
                    advance(count)

        def generate(engine: Engine, rows: Sequence[int]) -> list[Completion]:
            def hand_over(step: int, ended: Sequence[Sampled]) -> None:
                with lock:
                    if merged is not None:
                        merged.take(engine, step, [(rows[i], *rest) for i, *rest in ended])

            asked = [requests[i] for i in rows]
            completions = engine.generate(asked, params, role, locked_advance, hand_over)
            with lock:
                if merged is not None:
                    merged.end(engine)
            return completions

        return self._call(shares, generate)

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        def score(engine: Engine, rows: Sequence[int]) -> list[list[float]]:
            return engine.score(
                [prompts[i] for i in rows], [completions[i] for i in rows], role, temperature
            )

        return self._call(self._shares(prompts, _lengths(prompts, completions)), score)

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        def score_ids(engine: Engine, rows: Sequence[int]) -> list[np.ndarray]:
            return engine.score_ids(
                [prompts[i] for i in rows],
                [completions[i] for i in rows],
                [ids[i] for i in rows],
                role,
            )

        return self._call(self._shares(prompts, _lengths(prompts, completions)), score_ids)

    def sync(self, version: int) -> None:
        """Sync all replicas at once."""
        self._on_each(lambda engine: engine.sync(version))

    def sleep(self) -> None:
        self._on_each(lambda engine: engine.sleep())

    def wake(self) -> None:
        self._on_each(lambda engine: engine.wake())

    def peak_memory(self) -> int | None:
        return max((p for e in self.engines if (p := e.peak_memory()) is not None), default=None)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._threads.shutdown(wait=True)

    def _on_each(self, action: Callable[[Engine], None]) -> None:
        for future in [self._threads.submit(action, engine) for engine in self.engines]:
            future.result()

    def _shares(
        self, prompts: Sequence[Ids], costs: Sequence[int]
    ) -> list[tuple[Engine, list[int]]]:
        """Each engine with its share of the rows."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(tuple(prompt), []).append(index)
        groups = list(by_prompt.values())
        shares = share_out([sum(costs[i] for i in g) for g in groups], len(self.engines))
        by_engine = [sorted(i for g in share for i in groups[g]) for share in shares]
        return list(zip(self.engines, by_engine, strict=True))

    def _call(
        self,
        shares: Sequence[tuple[Engine, list[int]]],
        call: Callable[[Engine, Sequence[int]], Sequence[T]],
    ) -> list[T]:
        """Call each engine with its share. Returns the results in the order of rows."""
        futures = [
            (rows, self._threads.submit(call, engine, rows)) for engine, rows in shares if rows
        ]
        results: dict[int, T] = {}
        for rows, future in futures:
            results.update(zip(rows, future.result(), strict=True))
        return [results[i] for i in range(len(results))]


class _Merged:
    """What ends in several engines, in the order of their steps.

    It depends on no timing if that of each engine does not: what ends in a step is handed over when
    all engines have come as far.
    """

    def __init__(self, engines: Sequence[Engine], in_order: bool, finished: Finished) -> None:
        self.finished, self.in_order = finished, in_order
        self._steps: dict[Engine, float] = dict.fromkeys(engines, 0)
        self._held: dict[int, list[Sampled]] = {}

    def take(self, engine: Engine, step: int, ended: Sequence[Any]) -> None:
        """Take the completions that ended in an engine's step."""
        if not self.in_order:
            self.finished(step, ended)
            return
        self._held.setdefault(step, []).extend(ended)
        self._reach(engine, step)

    def end(self, engine: Engine) -> None:
        """The engine has nothing more to sample."""
        self._reach(engine, math.inf)

    def _reach(self, engine: Engine, step: float) -> None:
        self._steps[engine] = step
        reached = min(self._steps.values())
        for held in sorted(step for step in self._held if step <= reached):
            self.finished(held, sorted(self._held.pop(held), key=itemgetter(0)))


def add_counts(engines: Sequence[Engine]) -> tuple[int, int]:
    """The `score_counts` of several engines together."""
    scored, repeated = zip(*(engine.score_counts for engine in engines), strict=True)
    return sum(scored), sum(repeated)


def _lengths(a: Sequence[Ids], b: Sequence[Ids]) -> list[int]:
    return [len(x) + len(y) for x, y in zip(a, b, strict=True)]
