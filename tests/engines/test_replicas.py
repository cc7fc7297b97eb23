"""Replicas hand over what ends in the order of engine steps, whichever of them is faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from minidistill.engines.base import Engine, Finished, Ids, Sampled
from minidistill.engines.replicas import Replicas
from minidistill.types import Advance, Completion, Request, Role, SamplingParams


class StepEngine(Engine):
    """A completion ends in the step that is its request's seed. Steps take some time."""

    name = "steps"
    location = "a thread"
    streams = True
    ends_in_order = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.hold: threading.Event | None = None

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        completions = [Completion((r.seed,), (0.0,), "eos") for r in requests]
        for step in range(1, max(r.seed for r in requests) + 1):
            time.sleep(self.seconds)
            ended: list[Sampled] = [
                (i, completions[i], None) for i, r in enumerate(requests) if r.seed == step
            ]
            if finished is not None:
                finished(step, ended)
            if self.hold is not None:
                assert self.hold.wait(10)
        return completions

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        return [[float(p[0])] for p in prompts]

    def sync(self, version: int) -> None:
        """Nothing to do."""


REQUESTS = [Request((row // 2,), seed) for row, seed in enumerate([5, 3, 2, 2, 7, 1, 3, 4])]
HOW = (SamplingParams(8), Role.STUDENT)


def handed_over(engines: list[Engine]) -> list[tuple[int, list[int]]]:
    replicas, found = Replicas(engines), []
    completions = replicas.generate(
        REQUESTS,
        *HOW,
        finished=lambda step, ended: found.append((step, [index for index, *_ in ended])),
    )
    assert [c.token_ids for c in completions] == [(r.seed,) for r in REQUESTS]
    replicas.close()
    return [(step, rows) for step, rows in found if rows]


@pytest.mark.parametrize(
    "seconds", [(0.0, 0.01), (0.01, 0.0), (0.002, 0.002, 0.0, 0.0, 0.01)], ids=str
)
def test_the_order_is_that_of_the_steps(seconds: tuple[float, ...]) -> None:
    """With more replicas than prompts too: one of them then has nothing to do."""
    assert handed_over([StepEngine(s) for s in seconds]) == [
        (1, [5]),
        (2, [2, 3]),
        (3, [1, 6]),
        (4, [7]),
        (5, [0]),
        (7, [4]),
    ]


def test_replicas_whose_order_depends_on_timing_do_not_wait_for_each_other() -> None:
    class Unordered(StepEngine):
        ends_in_order = False

    slow = Unordered(0.0)
    slow.hold = threading.Event()
    early: list[int] = []

    def finished(step: int, ended: Sequence[Sampled]) -> None:
        early.extend(index for index, *_ in ended)
        if len(early) >= 4:  # all that the other one has
            assert slow.hold is not None
            slow.hold.set()

    replicas = Replicas([Unordered(0.0), slow])
    assert not replicas.ends_in_order
    replicas.generate(REQUESTS, *HOW, finished=finished)
    assert sorted(early) == list(range(8))
    replicas.close()


def test_they_score_while_they_sample() -> None:
    engines = [StepEngine(0.0), StepEngine(0.0)]
    for engine in engines:
        engine.hold = threading.Event()
    replicas = Replicas(engines)
    sampling = threading.Thread(target=replicas.generate, args=(REQUESTS, *HOW))
    sampling.start()
    prompts = [r.prompt_ids for r in REQUESTS]
    assert replicas.score(prompts, prompts, Role.TEACHER) == [[float(p[0])] for p in prompts]
    assert sampling.is_alive()
    for engine in engines:
        assert engine.hold is not None
        engine.hold.set()
    sampling.join()
    replicas.close()
