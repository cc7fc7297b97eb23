"""A step's rollouts: tasks drawn, completions sampled, rewarded, and scored.

The student samples them, or the teacher with the context (`orchestrator.sample_from`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, check_scores, named
from minidistill.envs.multi_turn import multi_turn
from minidistill.envs.protocol import Environment
from minidistill.placement.placement import Placement
from minidistill.reporting.terminal.base import Display
from minidistill.rollouts.conversations import Played, Player, errors_of, metrics_of
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
        self.sampler = Role(config.orchestrator.sample_from)
        """Whose completions are trained on."""
        self.conversing = multi_turn(environments)
        """The environments that are multi-turn."""

    def collect(self, engine: Engine, step: int, version: int) -> tuple[list[Rollout], Metrics]:
        """The rollouts of a step, sampled by the weights of `version`, and each stage's time."""
        began = time.perf_counter()
        drawn = self.draw(step)
        rollouts, metrics = self._sample(engine, drawn, step, version, began)
        metrics |= drawn.metrics
        if self.scores_teacher:
            repeats = RepeatCounter(engine)
            with self.display.phase("teacher", len(rollouts), "rollouts") as advance:
                began = time.perf_counter()
                rollouts = self.score_with_teacher(engine, rollouts)
                advance(len(rollouts))
            metrics |= {"time/teacher": time.perf_counter() - began} | repeats.metrics()
        return self.with_advantages(rollouts), metrics

    def _sample(
        self, engine: Engine, drawn: StepRequests, step: int, version: int, began: float
    ) -> tuple[list[Rollout], Metrics]:
        """The rollouts of a step with their rewards, and the metrics of both."""
        jobs, talking = drawn.jobs, self.conversing
        single = [i for i, (prompt, _) in enumerate(jobs) if prompt.env not in talking]
        played: list[Played] = []
        completions: list[Completion] = []
        with self.display.phase("sample", len(jobs), "rollouts") as advance:
            if single:
                asked = [jobs[i] for i in single]
                requests = [drawn.requests[i] for i in single]
                completions = engine.generate(requests, drawn.params, self.sampler, advance)
                check_completions(engine, completions, len(asked), drawn.params, named(asked))
            if talking:
                played = self._play(engine, drawn, step, advance)
        conversations = self._of_played(drawn, played, version)
        sampled = [*completions, *(r.completion for r in conversations)]
        metrics = sampling_metrics(sampled, time.perf_counter() - began) | metrics_of(played)
        rollouts = [
            self.rollout(*jobs[i], completion, version)
            for i, completion in zip(single, completions, strict=True)
        ]
        errors = errors_of(played)
        if self.computes_rewards and (single or not talking):
            with self.display.phase("score", len(rollouts), "rollouts") as advance:
                began = time.perf_counter()
                rollouts, failed = self.reward(rollouts, advance, len(jobs), errors)
            metrics["time/score"] = time.perf_counter() - began
            errors += failed
        if talking:
            check_errors(errors, len(jobs), self.config.orchestrator.max_env_error_frac)
            numbers = {(id(prompt), sample): number for number, (prompt, sample) in enumerate(jobs)}
            rollouts = sorted(
                [*rollouts, *conversations], key=lambda r: numbers[id(r.group), r.sample]
            )
        if self.computes_rewards or talking:
            metrics["env/errors"] = len(errors)
            warn_of_errors(errors)
        return rollouts, metrics

    def _play(
        self, engine: Engine, drawn: StepRequests, step: int, advance: Advance
    ) -> list[Played]:
        """The step's conversations, in the order of its jobs."""
        rows = [i for i, (prompt, _) in enumerate(drawn.jobs) if prompt.env in self.conversing]
        player = Player(
            self.builder,
            self.conversing,
            self.limit.sequence,
            drawn.params,
            lambda row, turn: stable_seed(self.config.seed, "train", step, rows[row], turn),
            self.sampler,
            context=self.sampler is Role.TEACHER,
            rewarded=self.computes_rewards,
        )
        limit, total = self.config.orchestrator.max_env_error_frac, len(drawn.jobs)
        jobs = [drawn.jobs[row] for row in rows]
        return player.play(engine, jobs, advance, lambda errors: check_errors(errors, total, limit))

    def _of_played(
        self, drawn: StepRequests, played: Sequence[Played], version: int
    ) -> list[Rollout]:
        """The samples of conversations as rollouts."""
        jobs = [job for job in drawn.jobs if job[0].env in self.conversing]
        return [
            Rollout(
                each.prompt,
                sample,
                each.completion,
                each.text,
                reward=conversation.reward if self.computes_rewards else None,
                policy_version=version,
                part=part,
                first=prompt,
            )
            for (prompt, sample), conversation in zip(jobs, played, strict=True)
            for part, each in enumerate(conversation.samples)
        ]

    def draw(self, step: int) -> StepRequests:
        """What a step samples: its prompts and requests."""
        orchestrator = self.config.orchestrator
        # tasks that are generated are not measured before they are drawn
        count = orchestrator.batch_size // self.group_size
        prompts, dropped = self.measurer.draw(self.tasks, step, count, self.limit)
        if dropped:
            logger.warning(f"step {step}: drew others for {dropped} prompts that are too long")
        jobs = [(prompt, sample) for prompt in prompts for sample in range(self.group_size)]
        context = self.sampler is Role.TEACHER
        requests = [
            Request(
                prompt.ids(self.sampler, context=context),
                stable_seed(self.config.seed, "train", step, index),
            )
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
        """How many of the sampler's most likely ids the teacher's engine will score."""
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
        """The rollouts with the log-probs that the teacher's engine gives their tokens.

        If the teacher has sampled them, these are the sampler's.
        """
        if self.sampler is Role.TEACHER:
            return [replace(r, teacher=TeacherScores(r.completion.logprobs)) for r in rollouts]
        prompts = [r.prompt.teacher_ids for r in rollouts]
        sequences = [r.completion.sequence for r in rollouts]
        name = named([(r.prompt, r.sample) for r in rollouts])
        if self._top_ids:
            ids = [_ids_to_score(r.completion) for r in rollouts]
            logps = engine.score_ids(prompts, sequences, ids, Role.TEACHER)
            scores = [TeacherScores(row[:, 0].tolist(), row[:, 1:]) for row in logps]
        else:
            scores = [TeacherScores(row) for row in engine.score(prompts, sequences, Role.TEACHER)]
        check_scores(engine, scores, sequences, name)
        return [
            replace(r, teacher=_of_sampled(score, r.completion))
            for r, score in zip(rollouts, scores, strict=True)
        ]


def _ids_to_score(completion: Completion) -> np.ndarray:
    """For each token of the sequence its own id, then the most likely ids if it was sampled."""
    assert completion.top_ids is not None
    sequence = np.array(completion.sequence)
    # what was not sampled has no such ids: its own, whose scores are left out again
    ids = np.repeat(sequence[:, None], 1 + completion.top_ids.shape[1], axis=1)
    ids[list(completion.sampled_at), 1:] = completion.top_ids
    return ids


def _of_sampled(scores: TeacherScores, completion: Completion) -> TeacherScores:
    """The scores of a sequence, those of its sampled tokens only."""
    if not completion.inserted:
        return scores
    places = list(completion.sampled_at)
    top = None if scores.top is None else scores.top[places]
    return TeacherScores([scores.logprobs[i] for i in places], top)


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
