"""Streamed collection: groups are scored and handed to the trainer while others are sampled."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from minidistill.engines.base import Engine
from minidistill.rollouts.collector import (
    Collector,
    RepeatCounter,
    sampling_metrics,
    warn_of_errors,
)
from minidistill.trainer.step import StepRollouts
from minidistill.types import (
    Advance,
    Completion,
    Metrics,
    Role,
    Rollout,
    TeacherScores,
)

MAX_PARTS = 8
"""Parts of a step. With more, less is left to do after the last completion, in smaller passes."""

Sampled = tuple[int, Completion, TeacherScores | None]


def split_into_parts(groups: int, tokens: int, least: int) -> list[range]:
    """Ranges of a step's groups, in order: at most MAX_PARTS, of at least about `least` tokens.

    `tokens` is the most that the step can have. It is known before the step is sampled, so a
    repeated step adds up its gradient in the same order, whatever finishes first.
    """
    parts = max(1, min(MAX_PARTS, groups, tokens // least))
    ends = [groups * (part + 1) // parts for part in range(parts)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class StreamCollector:
    """Samples in one thread, and rewards and scores complete groups in another."""

    def __init__(self, collector: Collector, engine: Engine, least_tokens: int) -> None:
        """A part of a step has at least about `least_tokens` tokens."""
        self.collector, self.engine, self.least_tokens = collector, engine, least_tokens
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="rollouts")

    def start(self, step: int, version: int) -> RolloutStream:
        """Start to sample a step's rollouts with the weights of `version`."""
        stream = RolloutStream(self.collector, self.engine, step, version, self.least_tokens)
        self._executor.submit(stream.sample)
        self._executor.submit(stream.complete)
        return stream

    def close(self) -> None:
        """Stop the threads. Close the engine before, so that a call in progress fails."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class RolloutStream:
    """The rollouts of one step, in parts of whole groups, in the order of the groups.

    An error of either thread is raised once, by the iterator. What the other thread still does then
    ends when the engine is closed.
    """

    def __init__(
        self, collector: Collector, engine: Engine, step: int, version: int, least_tokens: int
    ) -> None:
        self.collector, self.engine, self.version = collector, engine, version
        self.asked = collector.draw(step)
        self.max_tokens = self.asked.params.max_tokens
        longest = [len(p.student_ids) + self.max_tokens for p, _ in self.asked.jobs]
        self.parts = split_into_parts(len(self.asked.prompts), sum(longest), least_tokens)
        self._began = time.perf_counter()
        self._collecting = self._waited = 0.0
        self._collected: Metrics = {}
        self._sampled: queue.SimpleQueue[Sampled | Metrics | Exception] = queue.SimpleQueue()
        self._complete: queue.SimpleQueue[list[Rollout] | Exception | None] = queue.SimpleQueue()

    @property
    def rollouts(self) -> StepRollouts:
        """For the trainer, once."""
        runs_teacher = not self.collector.scores_teacher
        return StepRollouts(
            parts=self._take(),
            teacher_prompts=[p.teacher_ids for p in self.asked.prompts] if runs_teacher else [],
            tokens=self.size * self.max_tokens,
        )

    @property
    def size(self) -> int:
        """The number of rollouts, before any is dropped."""
        return len(self.asked.jobs)

    def _take(self) -> Iterator[list[Rollout]]:
        while True:
            began = time.perf_counter()
            part = self._complete.get()
            self._waited += time.perf_counter() - began
            if part is None:
                return
            if isinstance(part, Exception):
                raise part
            if part:  # not dropped entirely
                yield part

    def metrics(self, trained: Metrics) -> Metrics:
        """The step's metrics, from those of the training, which has just ended."""
        elapsed = time.perf_counter() - self._began
        training = trained["time/train"]
        hidden = self._collecting + training - elapsed
        return {
            **trained,
            **self._collected,
            "time/wait": self._waited,
            "perf/overlap": max(0.0, hidden / min(self._collecting, training)),
        }

    # -- the threads ---------------------------------------------------------------------------

    def sample(self) -> None:
        """Sample the completions, and hand each over as it ends."""
        requests = self.asked.requests
        if self.collector.scores_teacher and self.engine.scores_while_sampling:
            requests = [
                replace(request, teacher_ids=prompt.teacher_ids)
                for request, (prompt, _) in zip(requests, self.asked.jobs, strict=True)
            ]
        try:
            with self.collector.display.phase("sample", self.size, "rollouts") as advance:
                completions = self.engine.generate(
                    requests,
                    self.asked.params,
                    Role.STUDENT,
                    advance,
                    lambda *sampled: self._sampled.put(sampled),
                )
            seconds = time.perf_counter() - self._began
            self._sampled.put(sampling_metrics(completions, seconds))
        except Exception as error:
            self._sampled.put(error)

    def complete(self) -> None:
        """Reward and score whole groups, in order, and hand over the parts."""
        try:
            with contextlib.ExitStack() as phases:
                self._complete_all(phases)
            self._complete.put(None)
        except Exception as error:
            self._complete.put(error)

    def _complete_all(self, phases: contextlib.ExitStack) -> None:
        collector, group_size = self.collector, self.collector.group_size

        def phase(name: str) -> Advance:
            return phases.enter_context(collector.display.phase(name, self.size, "rollouts"))

        score_advance = phase("score") if collector.computes_rewards else None
        teacher_advance = phase("teacher") if collector.scores_teacher else None
        repeats = RepeatCounter(self.engine)
        ready: dict[int, tuple[Completion, TeacherScores | None]] = {}
        errors: list[str] = []
        reward_seconds = teacher_seconds = 0.0
        for groups in self.parts:
            rows = range(groups.start * group_size, groups.stop * group_size)
            while not all(row in ready for row in rows):
                self._receive(ready)
            rollouts = [self._rollout(row, *ready[row]) for row in rows]
            if score_advance is not None:
                began = time.perf_counter()
                rollouts, failed = collector.reward(rollouts, score_advance)
                errors += failed
                collector.check_errors(errors, self.size)
                reward_seconds += time.perf_counter() - began
            if teacher_advance is not None:
                began = time.perf_counter()
                if not self.engine.scores_while_sampling and rollouts:
                    rollouts = collector.score_with_teacher(self.engine, rollouts)
                teacher_advance(len(rollouts))
                teacher_seconds += time.perf_counter() - began
            self._complete.put(collector.with_advantages(rollouts))
            self._collecting = time.perf_counter() - self._began
        while not self._collected:
            self._receive(ready)
        warn_of_errors(errors)
        if score_advance is not None:
            self._collected |= {"time/score": reward_seconds, "env/errors": len(errors)}
        if teacher_advance is not None:
            if not self.engine.scores_while_sampling:
                self._collected["time/teacher"] = teacher_seconds
            self._collected |= repeats.metrics()

    def _receive(self, ready: dict[int, tuple[Completion, TeacherScores | None]]) -> None:
        """Wait for one more completion, or for the end of the sampling."""
        sampled = self._sampled.get()
        if isinstance(sampled, Exception):
            raise sampled
        if isinstance(sampled, dict):
            self._collected = sampled
        else:
            row, completion, scores = sampled
            ready[row] = completion, scores

    def _rollout(self, row: int, completion: Completion, scores: TeacherScores | None) -> Rollout:
        prompt, sample = self.asked.jobs[row]
        rollout = self.collector.rollout(prompt, sample, completion, self.version)
        return replace(rollout, teacher=scores)
