"""Streamed collection: groups are scored and handed to the trainer while others are sampled."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

from minidistill.engines.base import Engine, Sampled
from minidistill.engines.checks import check_completion, check_scores, named
from minidistill.rollouts.collector import (
    Collector,
    RepeatCounter,
    sampling_metrics,
    warn_of_errors,
)
from minidistill.trainer.step import StepResult, StepRollouts
from minidistill.types import Advance, Completion, Metrics, Role, Rollout, TeacherScores

MAX_PARTS = 8
"""Parts of a step. With more, less is left to do after the last completion, in smaller passes."""


def split_into_parts(groups: int, tokens: int, least: int) -> list[int]:
    """How many of a step's groups are in each part: at most MAX_PARTS, of about `least` tokens.

    `tokens` is the most that the step can have, which is known before it is sampled.
    """
    parts = max(1, min(MAX_PARTS, groups, tokens // least))
    ends = [groups * part // parts for part in range(parts + 1)]
    return [end - start for start, end in pairwise(ends)]


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
    """The rollouts of one step, in parts of whole groups.

    A part has the groups that ended next in the engine, or the next by number if the engine ends
    them in an order that depends on timing. So a repeated step adds up its gradient in the same
    order.

    An error of either thread is raised once, by the iterator, a `SystemExit` of an environment too.
    What the other thread still does then ends when the engine is closed.
    """

    def __init__(
        self, collector: Collector, engine: Engine, step: int, version: int, least_tokens: int
    ) -> None:
        self.collector, self.engine, self.version = collector, engine, version
        self.drawn = collector.draw(step)
        self.max_tokens = self.drawn.params.max_tokens
        longest = [len(p.student_ids) + self.max_tokens for p, _ in self.drawn.jobs]
        self.parts = split_into_parts(len(self.drawn.prompts), sum(longest), least_tokens)
        self._ready: dict[int, Sampled] = {}
        self._missing = [collector.group_size] * len(self.drawn.prompts)  # samples of each group
        self._ended: list[int] = []  # groups
        self._taken = 0
        self._repeats = RepeatCounter(engine)  # before the first score
        self._began = time.perf_counter()
        self._collecting = self._waited = 0.0
        self._collected: Metrics = {}
        self._sampled: queue.SimpleQueue[Sequence[Sampled] | Metrics | BaseException] = (
            queue.SimpleQueue()
        )
        self._complete: queue.SimpleQueue[list[Rollout] | BaseException | None] = (
            queue.SimpleQueue()
        )

    @property
    def rollouts(self) -> StepRollouts:
        """For the trainer, once."""
        runs_teacher = not self.collector.scores_teacher
        return StepRollouts(
            parts=self._take(),
            teacher_prompts=[p.teacher_ids for p in self.drawn.prompts] if runs_teacher else [],
            tokens=self.size * self.max_tokens,
        )

    @property
    def size(self) -> int:
        """The number of rollouts, before any is dropped."""
        return len(self.drawn.jobs)

    def _take(self) -> Iterator[list[Rollout]]:
        while True:
            began = time.perf_counter()
            part = self._complete.get()
            self._waited += time.perf_counter() - began
            if part is None:
                return
            if isinstance(part, BaseException):
                raise part
            if part:  # not dropped entirely
                yield part

    def by_number(self, result: StepResult) -> StepResult:
        """The result with the rollouts in the order of their groups."""
        numbers = {(id(p), s): number for number, (p, s) in enumerate(self.drawn.jobs)}
        pairs = zip(result.rollouts, result.tokens, strict=True)
        ordered = sorted(pairs, key=lambda pair: numbers[id(pair[0].prompt), pair[0].sample])
        rollouts, tokens = zip(*ordered, strict=True)
        return replace(result, rollouts=list(rollouts), tokens=list(tokens))

    def metrics(self, trained: Metrics) -> Metrics:
        """The step's metrics, from those of the training, which has just ended."""
        elapsed = time.perf_counter() - self._began
        training = trained["time/train"]
        hidden = self._collecting + training - elapsed
        return {
            **trained,
            **self._collected,
            **self.drawn.metrics,
            "time/wait": self._waited,
            "perf/overlap": max(0.0, hidden / min(self._collecting, training)),
        }

    @property
    def _scores_while_sampling(self) -> bool:
        """Whether the engine scores each completion that the student has sampled as it ends."""
        by_engine = self.collector.scores_teacher and self.engine.scores_while_sampling
        return by_engine and self.collector.sampler is Role.STUDENT

    # -- the threads ---------------------------------------------------------------------------

    def sample(self) -> None:
        """Sample the completions, and hand each over as it ends."""
        requests = self.drawn.requests
        if self._scores_while_sampling:
            requests = [
                replace(request, teacher_ids=prompt.teacher_ids)
                for request, (prompt, _) in zip(requests, self.drawn.jobs, strict=True)
            ]
        try:
            with self.collector.display.phase("sample", self.size, "rollouts") as advance:
                completions = self.engine.generate(
                    requests,
                    self.drawn.params,
                    self.collector.sampler,
                    advance,
                    lambda step, ended: self._sampled.put(ended),
                )
            seconds = time.perf_counter() - self._began
            self._sampled.put(sampling_metrics(completions, seconds))
        except BaseException as error:
            self._sampled.put(error)

    def complete(self) -> None:
        """Reward and score whole groups, in order, and hand over the parts."""
        try:
            with contextlib.ExitStack() as phases:
                self._complete_all(phases)
            self._complete.put(None)
        except BaseException as error:
            self._complete.put(error)

    def _complete_all(self, phases: contextlib.ExitStack) -> None:
        collector, group_size = self.collector, self.collector.group_size

        def phase(name: str) -> Advance:
            return phases.enter_context(collector.display.phase(name, self.size, "rollouts"))

        score_advance = phase("score") if collector.computes_rewards else None
        teacher_advance = phase("teacher") if collector.scores_teacher else None
        errors: list[str] = []
        reward_seconds = teacher_seconds = 0.0
        for size in self.parts:
            groups = sorted(self._next_group() for _ in range(size))
            rows = [g * group_size + sample for g in groups for sample in range(group_size)]
            rollouts = [self._rollout(*self._ready.pop(row)) for row in rows]
            if score_advance is not None:
                began = time.perf_counter()
                rollouts, failed = collector.reward(rollouts, score_advance, self.size, errors)
                errors += failed
                reward_seconds += time.perf_counter() - began
            if teacher_advance is not None:
                began = time.perf_counter()
                if not self._scores_while_sampling and rollouts:
                    rollouts = collector.score_with_teacher(self.engine, rollouts)
                teacher_advance(len(rollouts))
                teacher_seconds += time.perf_counter() - began
            self._complete.put(collector.with_advantages(rollouts))
            self._collecting = time.perf_counter() - self._began
        while not self._collected:
            self._receive()
        warn_of_errors(errors)
        if score_advance is not None:
            self._collected |= {"time/score": reward_seconds, "env/errors": len(errors)}
        if teacher_advance is not None:
            if not self._scores_while_sampling:
                self._collected["time/teacher"] = teacher_seconds
            self._collected |= self._repeats.metrics()

    def _next_group(self) -> int:
        """Wait for a group to be complete. Returns its number."""
        while True:
            if self.engine.ends_in_order and self._taken < len(self._ended):
                group = self._ended[self._taken]
                break
            if not self.engine.ends_in_order and self._missing[self._taken] == 0:
                group = self._taken
                break
            self._receive()
        self._taken += 1
        return group

    def _receive(self) -> None:
        """Wait for more completions, or for the end of the sampling."""
        sampled = self._sampled.get()
        if isinstance(sampled, BaseException):
            raise sampled
        if isinstance(sampled, dict):
            self._collected = sampled
            return
        for result in sampled:
            self._ready[result[0]] = result
            group = result[0] // self.collector.group_size
            self._missing[group] -= 1
            if self._missing[group] == 0:
                self._ended.append(group)

    def _rollout(self, row: int, completion: Completion, scores: TeacherScores | None) -> Rollout:
        name = named(self.drawn.jobs)
        check_completion(self.engine, completion, self.drawn.params, name(row))
        if scores is not None:
            check_scores(self.engine, [scores], [completion.token_ids], lambda _: name(row))
        prompt, sample = self.drawn.jobs[row]
        rollout = self.collector.rollout(prompt, sample, completion, self.version)
        return replace(rollout, teacher=scores)
