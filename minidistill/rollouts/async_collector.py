"""Asynchronous collection: the next step's rollouts are sampled while this step is trained on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from minidistill.engines.base import Engine
from minidistill.rollouts.collector import Collector
from minidistill.types import Metrics, Rollout

Collected = tuple[list[Rollout], Metrics]


class AsyncCollector:
    """Collects in one thread, one step ahead.

    New weights that are synced meanwhile take effect in the middle of completions (on servers: with
    the next completion). The engine records which version sampled each token.
    """

    def __init__(self, collector: Collector, engine: Engine) -> None:
        self.collector, self.engine = collector, engine
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._next: tuple[int, Future[Collected]] | None = None

    def start(self, step: int, version: int) -> None:
        """Start collecting a step's rollouts with the weights of `version`."""
        collect = self.collector.collect
        self._next = step, self._executor.submit(collect, self.engine, step, version)

    def take(self, step: int, version: int) -> Collected:
        """Wait for the step's rollouts. Starts collecting them if `start` was not called."""
        if self._next is None or self._next[0] != step:
            self.start(step, version)
        assert self._next is not None
        began = time.perf_counter()
        rollouts, metrics = self._next[1].result()
        self._next = None
        waited = time.perf_counter() - began
        collecting = sum(v for k, v in metrics.items() if k.startswith("time/"))
        ages = [
            step - 1 - sampled
            for r in rollouts
            for sampled in r.completion.token_versions(r.policy_version)
        ]
        return rollouts, metrics | {
            "time/wait": waited,
            "async/overlap": max(0.0, 1 - waited / collecting) if collecting else 0.0,
            "async/staleness": sum(ages) / len(ages),
        }

    def wait_until_idle(self) -> None:
        """Wait until no rollouts are being collected, so that the engine is free."""
        if self._next is not None:
            self._next[1].result()

    def close(self) -> None:
        """Stop the thread. Close the engine before, so that a call in progress fails."""
        self._executor.shutdown(wait=True, cancel_futures=True)
