"""Sampling one step ahead: the next step's rollouts are made while this one is trained on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from minidistill.engines.base import Engine
from minidistill.rollouts.collector import Collector
from minidistill.types import Metrics, Rollout

Collected = tuple[list[Rollout], Metrics]


class Ahead:
    """One thread that collects a step's rollouts, and what of that was waited for.

    Weights that are synced meanwhile take over in the middle of completions, on servers with the
    next one: the engine notes which version sampled which token.
    """

    def __init__(self, collector: Collector, engine: Engine) -> None:
        self.collector, self.engine = collector, engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._next: tuple[int, Future[Collected]] | None = None

    def start(self, step: int, version: int) -> None:
        """Begin on a step's rollouts, with the weights of `version`."""
        collect = self.collector.collect
        self._next = step, self._thread.submit(collect, self.engine, step, version)

    def take(self, step: int, version: int) -> Collected:
        """The step's rollouts, waited for; begun only now where they were not."""
        if self._next is None or self._next[0] != step:
            self.start(step, version)
        assert self._next is not None
        began = time.perf_counter()
        rollouts, metrics = self._next[1].result()
        self._next = None
        waited = time.perf_counter() - began
        took = sum(v for k, v in metrics.items() if k.startswith("time/"))
        ages = [
            step - 1 - sampled
            for r in rollouts
            for sampled in r.completion.token_versions(r.policy_version)
        ]
        return rollouts, metrics | {
            "time/wait": waited,
            "async/overlap": max(0.0, 1 - waited / took) if took else 0.0,
            "async/staleness": sum(ages) / len(ages),
        }

    def settle(self) -> None:
        """Wait until the engine is free."""
        if self._next is not None:
            self._next[1].result()

    def close(self) -> None:
        """The engine must be closed before: what is sampled at this moment is given up."""
        self._thread.shutdown(wait=True, cancel_futures=True)
