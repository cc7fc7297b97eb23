"""A step's rollouts: drawn, sampled by the student, scored by environments and by the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import Engine, Request
from minidistill.envs import Environment
from minidistill.placement.teacher import Teaching
from minidistill.reporting.terminal import Display
from minidistill.run import preflight
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_errors, score, with_advantages
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import Metrics, Rollout, TeacherScores


class Collector:
    """Makes rollouts, the same for a seed, a step and the weights that sample."""

    def __init__(
        self,
        config: Config,
        environments: Mapping[str, Environment],
        builder: PromptBuilder,
        teaching: Teaching,
        limit: int,
        display: Display,
        warn: Callable[[str], None],
    ) -> None:
        self.config, self.environments, self.builder = config, environments, builder
        self.teaching, self.limit, self.display, self.warn = teaching, limit, display, warn
        self.tasks = TaskSampler(environments, config.seed)

    def collect(self, engine: Engine, step: int, version: int) -> tuple[list[Rollout], Metrics]:
        """The rollouts of a step, sampled by the weights of `version`, and what they took."""
        metrics: Metrics = {}
        rollouts = self._sample(engine, step, version, metrics)
        if not self.config.orchestrator.buffer.skip_verification:
            rollouts = self._score(rollouts, metrics)
        if self.teaching.scorer == "engine":
            rollouts = self._teach(engine, rollouts, metrics)
        return with_advantages(rollouts, self.config.orchestrator.advantage.std_norm), metrics

    def _sample(self, engine: Engine, step: int, version: int, metrics: Metrics) -> list[Rollout]:
        began = time.perf_counter()
        orchestrator = self.config.orchestrator
        samples = orchestrator.rollouts_per_example
        drawn = self.tasks.draw(step, orchestrator.batch_size // samples)
        prompts = [self.builder.build(env, task) for env, task in drawn]
        preflight.check_lengths(self.config, self.limit, prompts)
        jobs = [(prompt, sample) for prompt in prompts for sample in range(samples)]
        requests = [
            Request(p.student_ids, stable_seed(self.config.seed, "train", step, i))
            for i, (p, _) in enumerate(jobs)
        ]
        more: dict[str, Any] = {}
        if self.teaching.scorer == "engine" and self.teaching.estimator == "top_k":
            more["top_k"] = self.config.trainer.loss.top_k
        with self.display.phase("sample", len(jobs), "rollouts") as advance:
            completions = engine.generate(
                requests,
                max_tokens=orchestrator.sampling.max_tokens,
                temperature=orchestrator.sampling.temperature,
                student=True,
                advance=advance,
                **more,
            )
        tokens = sum(len(c.token_ids) for c in completions)
        seconds = time.perf_counter() - began
        metrics |= {"time/sample": seconds, "perf/sample_tokens_per_second": tokens / seconds}
        return [
            Rollout(p, s, c, self.builder.decode(c.token_ids), policy_version=version)
            for (p, s), c in zip(jobs, completions, strict=True)
        ]

    def _score(self, rollouts: Sequence[Rollout], metrics: Metrics) -> list[Rollout]:
        """The rollouts with their rewards, without those whose environment failed."""
        began = time.perf_counter()
        with self.display.phase("score", len(rollouts), "rollouts") as advance:
            rewards, errors = score(self.environments, rollouts, advance)
        check_errors(errors, len(rollouts), self.config.orchestrator.max_env_error_frac)
        metrics |= {"time/score": time.perf_counter() - began, "env/errors": len(errors)}
        if errors:
            self.warn(f"{len(errors)} rollouts dropped: {errors[0]}")
        return [
            replace(rollout, reward=reward)
            for rollout, reward in zip(rollouts, rewards, strict=True)
            if reward is not None
        ]

    def _teach(self, engine: Any, rollouts: Sequence[Rollout], metrics: Metrics) -> list[Rollout]:
        """The rollouts with the log-probs that the teacher's engine gives their tokens."""
        began = time.perf_counter()
        prompts = [r.prompt.teacher_ids for r in rollouts]
        completions = [r.completion.token_ids for r in rollouts]
        with self.display.phase("teacher", len(rollouts), "rollouts") as advance:
            if self.teaching.estimator == "top_k":
                # the sampled token's column, then those of the likeliest ones
                ids = [np.c_[list(r.completion.token_ids), r.completion.top_ids] for r in rollouts]
                found = engine.score_ids(prompts, completions, ids, student=False)
                scores = [TeacherScores(row[:, 0].tolist(), row[:, 1:]) for row in found]
            else:
                logps = engine.score(prompts, completions, temperature=1.0, student=False)
                scores = [TeacherScores(row) for row in logps]
            advance(len(rollouts))
        metrics["time/teacher"] = time.perf_counter() - began
        return [replace(r, teacher=s) for r, s in zip(rollouts, scores, strict=True)]
