"""A step's rollouts: tasks drawn, completions sampled by the student, rewarded, and scored."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.envs.protocol import Environment
from minidistill.placement.placement import Placement
from minidistill.reporting.terminal.base import Display
from minidistill.seeding import stable_seed
from minidistill.tasks.lengths import check_lengths
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_errors, score, with_advantages
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import Metrics, Request, Role, Rollout, SamplingParams, TeacherScores

logger = logging.getLogger(__name__)


class Collector:
    """Collects rollouts, which depend only on the seed, the step and the sampling weights."""

    def __init__(
        self,
        config: Config,
        environments: Mapping[str, Environment],
        builder: PromptBuilder,
        placement: Placement,
        display: Display,
    ) -> None:
        self.config, self.environments, self.builder = config, environments, builder
        self.placement, self.display = placement, display
        self.tasks = TaskSampler(environments, config.seed)

    def collect(self, engine: Engine, step: int, version: int) -> tuple[list[Rollout], Metrics]:
        """The rollouts of a step, sampled by the weights of `version`, and each stage's time."""
        metrics: Metrics = {}
        rollouts = self._sample(engine, step, version, metrics)
        if not self.config.orchestrator.buffer.skip_verification:
            rollouts = self._reward(rollouts, metrics)
        if self.placement.teacher.scorer == "engine":
            rollouts = self._score_with_teacher(engine, rollouts, metrics)
        return with_advantages(rollouts, self.config.orchestrator.advantage.std_norm), metrics

    def _sample(self, engine: Engine, step: int, version: int, metrics: Metrics) -> list[Rollout]:
        began = time.perf_counter()
        orchestrator = self.config.orchestrator
        group_size = orchestrator.rollouts_per_example
        tasks = self.tasks.draw(step, orchestrator.batch_size // group_size)
        prompts = [self.builder.build(env, task) for env, task in tasks]
        check_lengths(self.config, self.placement.max_length, prompts)
        jobs = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        requests = [
            Request(prompt.student_ids, stable_seed(self.config.seed, "train", step, index))
            for index, (prompt, _) in enumerate(jobs)
        ]
        sampling = orchestrator.sampling
        params = SamplingParams(sampling.max_tokens, sampling.temperature, self._top_ids)
        with self.display.phase("sample", len(jobs), "rollouts") as advance:
            completions = engine.generate(requests, params, Role.STUDENT, advance)
        tokens = sum(len(c.token_ids) for c in completions)
        seconds = time.perf_counter() - began
        metrics |= {"time/sample": seconds, "perf/sample_tokens_per_second": tokens / seconds}
        return [
            Rollout(p, s, c, self.builder.decode(c.token_ids), policy_version=version)
            for (p, s), c in zip(jobs, completions, strict=True)
        ]

    @property
    def _top_ids(self) -> int:
        """How many of the sampler's likeliest ids the teacher's engine will score."""
        if self.placement.teacher.scorer != "engine":
            return 0
        return self.placement.teacher.estimator.top_ids(self.config.trainer.loss.top_k)

    def _reward(self, rollouts: Sequence[Rollout], metrics: Metrics) -> list[Rollout]:
        """The rollouts with their rewards, without those whose environment failed."""
        began = time.perf_counter()
        with self.display.phase("score", len(rollouts), "rollouts") as advance:
            rewards, errors = score(self.environments, rollouts, advance)
        check_errors(errors, len(rollouts), self.config.orchestrator.max_env_error_frac)
        metrics |= {"time/score": time.perf_counter() - began, "env/errors": len(errors)}
        if errors:
            logger.warning(f"{len(errors)} rollouts dropped: {errors[0]}")
        return [
            replace(rollout, reward=reward)
            for rollout, reward in zip(rollouts, rewards, strict=True)
            if reward is not None
        ]

    def _score_with_teacher(
        self, engine: Engine, rollouts: Sequence[Rollout], metrics: Metrics
    ) -> list[Rollout]:
        """The rollouts with the log-probs that the teacher's engine gives their tokens."""
        began = time.perf_counter()
        prompts = [r.prompt.teacher_ids for r in rollouts]
        completions = [r.completion.token_ids for r in rollouts]
        with self.display.phase("teacher", len(rollouts), "rollouts") as advance:
            if self._top_ids:
                # the sampled token's column, then those of the likeliest ids
                ids = [np.c_[list(r.completion.token_ids), r.completion.top_ids] for r in rollouts]
                logps = engine.score_ids(prompts, completions, ids, Role.TEACHER)
                scores = [TeacherScores(row[:, 0].tolist(), row[:, 1:]) for row in logps]
            else:
                scores = [
                    TeacherScores(row) for row in engine.score(prompts, completions, Role.TEACHER)
                ]
            advance(len(rollouts))
        metrics["time/teacher"] = time.perf_counter() - began
        return [replace(r, teacher=s) for r, s in zip(rollouts, scores, strict=True)]
