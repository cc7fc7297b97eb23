"""A step's rollouts: tasks drawn, completions sampled by the student, rewarded, and scored."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, check_scores, named
from minidistill.envs.protocol import Environment
from minidistill.placement.placement import Placement
from minidistill.reporting.terminal.base import Display
from minidistill.seeding import stable_seed
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import Measurer
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_errors, score, with_advantages
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import (
    Advance,
    Completion,
    Metrics,
    Prompt,
    Request,
    Role,
    Rollout,
    SamplingParams,
    Task,
    TeacherScores,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepRequests:
    """What a step samples."""

    prompts: list[Prompt]
    jobs: list[tuple[Prompt, int]]
    """Each request's prompt, and its number among the samples of that prompt."""
    requests: list[Request]
    params: SamplingParams
    metrics: Metrics
    """How many prompts were replaced because they are too long, if that is allowed."""


class Collector:
    """Collects rollouts, which depend only on the seed, the step and the sampling weights."""

    def __init__(
        self,
        config: Config,
        environments: Mapping[str, Environment],
        builder: PromptBuilder,
        placement: Placement,
        display: Display,
        tasks: Mapping[str, Sequence[Task]] | None = None,
    ) -> None:
        """`tasks` has those to train on, by environment; by default all of them."""
        self.config, self.environments, self.builder = config, environments, builder
        self.placement, self.display = placement, display
        self.tasks = TaskSampler(environments, config.seed, tasks, config.orchestrator.weights)
        self.measurer = Measurer(builder, config.orchestrator.overlong)
        self.limit = PromptLimit.of(config, placement.max_length)

    def collect(self, engine: Engine, step: int, version: int) -> tuple[list[Rollout], Metrics]:
        """The rollouts of a step, sampled by the weights of `version`, and each stage's time."""
        metrics: Metrics = {}
        began = time.perf_counter()
        drawn = self.draw(step)
        metrics |= drawn.metrics
        with self.display.phase("sample", len(drawn.requests), "rollouts") as advance:
            completions = engine.generate(drawn.requests, drawn.params, Role.STUDENT, advance)
        check_completions(engine, completions, len(drawn.jobs), drawn.params, named(drawn.jobs))
        metrics |= sampling_metrics(completions, time.perf_counter() - began)
        rollouts = [
            self.rollout(p, s, c, version)
            for (p, s), c in zip(drawn.jobs, completions, strict=True)
        ]
        if self.computes_rewards:
            with self.display.phase("score", len(rollouts), "rollouts") as advance:
                began = time.perf_counter()
                rollouts, errors = self.reward(rollouts, advance, len(drawn.jobs))
            metrics |= {"time/score": time.perf_counter() - began, "env/errors": len(errors)}
            warn_of_errors(errors)
        if self.scores_teacher:
            repeats = RepeatCounter(engine)
            with self.display.phase("teacher", len(rollouts), "rollouts") as advance:
                began = time.perf_counter()
                rollouts = self.score_with_teacher(engine, rollouts)
                advance(len(rollouts))
            metrics |= {"time/teacher": time.perf_counter() - began} | repeats.metrics()
        return self.with_advantages(rollouts), metrics

    def draw(self, step: int) -> StepRequests:
        """What a step samples: its prompts and requests."""
        orchestrator = self.config.orchestrator
        # tasks that are generated are not measured before they are drawn
        count = orchestrator.batch_size // self.group_size
        prompts, dropped = self.measurer.draw(self.tasks, step, count, self.limit)
        if dropped:
            logger.warning(f"step {step}: drew others for {dropped} prompts that are too long")
        jobs = [(prompt, sample) for prompt in prompts for sample in range(self.group_size)]
        requests = [
            Request(prompt.student_ids, stable_seed(self.config.seed, "train", step, index))
            for index, (prompt, _) in enumerate(jobs)
        ]
        sampling = orchestrator.sampling
        params = SamplingParams(sampling.max_tokens, sampling.temperature, self._top_ids)
        metrics = {} if orchestrator.overlong == "refuse" else {"prompts/overlong": float(dropped)}
        return StepRequests(prompts, jobs, requests, params, metrics)

    def rollout(self, prompt: Prompt, sample: int, completion: Completion, version: int) -> Rollout:
        text = self.builder.decode(completion.token_ids)
        return Rollout(prompt, sample, completion, text, policy_version=version)

    def with_advantages(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Whole groups, with their advantages."""
        return with_advantages(rollouts, self.config.orchestrator.advantage.std_norm)

    @property
    def group_size(self) -> int:
        """Rollouts of a prompt."""
        return self.config.orchestrator.rollouts_per_example

    @property
    def computes_rewards(self) -> bool:
        return not self.config.orchestrator.buffer.skip_verification

    @property
    def scores_teacher(self) -> bool:
        """Whether an engine scores the teacher, and not the trainer."""
        return self.placement.teacher.scorer == "engine"

    @property
    def _top_ids(self) -> int:
        """How many of the sampler's likeliest ids the teacher's engine will score."""
        if self.placement.teacher.scorer != "engine":
            return 0
        return self.placement.teacher.estimator.top_ids(self.config.trainer.loss.top_k)

    def reward(
        self, rollouts: Sequence[Rollout], advance: Advance, total: int, earlier: Sequence[str] = ()
    ) -> tuple[list[Rollout], list[str]]:
        """The rollouts with their rewards, without those that the environment failed on; errors.

        Raises UserError (exit code 4) if too many of a step's `total` rollouts failed; `earlier`
        has the errors of those that were rewarded before.
        """
        limit = self.config.orchestrator.max_env_error_frac
        rewards, errors = score(
            self.environments,
            rollouts,
            advance,
            lambda errors: check_errors([*earlier, *errors], total, limit),
        )
        kept = [
            replace(rollout, reward=reward)
            for rollout, reward in zip(rollouts, rewards, strict=True)
            if reward is not None
        ]
        return kept, errors

    def score_with_teacher(self, engine: Engine, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with the log-probs that the teacher's engine gives their tokens."""
        prompts = [r.prompt.teacher_ids for r in rollouts]
        completions = [r.completion.token_ids for r in rollouts]
        if self._top_ids:
            # the sampled token's column, then those of the likeliest ids
            ids = [np.c_[list(r.completion.token_ids), r.completion.top_ids] for r in rollouts]
            logps = engine.score_ids(prompts, completions, ids, Role.TEACHER)
            scores = [TeacherScores(row[:, 0].tolist(), row[:, 1:]) for row in logps]
        else:
            scores = [
                TeacherScores(row) for row in engine.score(prompts, completions, Role.TEACHER)
            ]
        check_scores(engine, scores, completions, named([(r.prompt, r.sample) for r in rollouts]))
        return [replace(r, teacher=s) for r, s in zip(rollouts, scores, strict=True)]


def sampling_metrics(completions: Iterable[Completion], seconds: float) -> Metrics:
    tokens = sum(len(c.token_ids) for c in completions)
    return {"time/sample": seconds, "perf/sample_tokens_per_second": tokens / seconds}


def warn_of_errors(errors: Sequence[str]) -> None:
    if errors:
        logger.warning(f"{len(errors)} rollouts dropped: {errors[0]}")


class RepeatCounter:
    """Counts from now on which of the sequences that an engine scores it computes twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.before = engine, engine.score_counts

    def metrics(self) -> Metrics:
        """Their share; empty if the engine does not count."""
        scored, repeated = (
            now - then for now, then in zip(self.engine.score_counts, self.before, strict=True)
        )
        return {"perf/teacher_repeat_frac": repeated / scored} if scored else {}
