"""Evaluations on held-out tasks: rewards of the student and of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, named
from minidistill.envs.protocol import Environment, has_rewards
from minidistill.reporting.terminal.base import Display
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_errors, score
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.types import Advance, Prompt, Request, Role, Rollout, SamplingParams

logger = logging.getLogger(__name__)
HELD_OUT = 128  # prompts for the held-out KL


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of an evaluation."""

    rewards: dict[str, list[float]]
    """The mean reward of each task, by environment that has rewards."""
    length: float
    """Mean tokens of a completion."""


def held_out(prompts: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """The prompts for the held-out KL: the first of each environment, in equal numbers."""
    count = max(1, HELD_OUT // len(prompts))
    return [prompt for by_env in prompts.values() for prompt in by_env[:count]]


class Evaluator:
    """Evaluates on a fixed set of held-out tasks, with the same seeds every time.

    With equal seeds two evaluations differ by their models only, not by the draws.
    """

    def __init__(
        self,
        config: Config,
        environments: Mapping[str, Environment],
        prompts: Mapping[str, Sequence[Prompt]],
        builder: PromptBuilder,
        engine: Engine,
        display: Display,
    ) -> None:
        """`prompts` has those of each environment."""
        assert config.orchestrator.eval is not None
        self.config, self.settings = config, config.orchestrator.eval
        self.environments, self.engine, self.display = environments, engine, display
        self.prompts, self.builder = prompts, builder

    @explain_out_of_memory(
        "evaluating",
        where="orchestrator.eval.batch_size",
        fix="lower orchestrator.eval.batch_size or orchestrator.eval.sampling.max_tokens",
    )
    def run(self, label: str, role: Role, *, context: bool) -> Scores:
        """Sample and score every task in a role, with or without the context in the prompt."""
        samples = self.settings.rollouts_per_example
        jobs = [
            (prompt, sample)
            for prompts in self.prompts.values()
            for prompt in prompts
            for sample in range(samples)
        ]
        rollouts: list[Rollout] = []
        with self.display.phase(f"evaluate {label}", len(jobs), "rollouts") as advance:
            for start in range(0, len(jobs), self.settings.batch_size):
                batch = jobs[start : start + self.settings.batch_size]
                rollouts += self._sample(batch, role, context, advance)
        with self.display.phase("score", len(jobs), "rollouts") as advance:
            limit = self.config.orchestrator.max_env_error_frac
            rewards, errors = score(
                self.environments,
                rollouts,
                advance,
                lambda errors: check_errors(errors, len(jobs), limit),
            )
        if errors:
            logger.warning(f"{len(errors)} evaluation rollouts could not be scored: {errors[0]}")
        by_env: dict[str, list[float]] = {
            name: [] for name in self.prompts if has_rewards(self.environments[name])
        }
        for start in range(0, len(jobs), samples):
            # a rollout that cannot be scored counts as 0, so that evaluations stay comparable
            total = sum(r.value for r in rewards[start : start + samples] if r)
            if (name := jobs[start][0].env) in by_env:
                by_env[name].append(total / samples)
        length = sum(len(r.completion.token_ids) for r in rollouts) / len(jobs)
        return Scores(by_env, length)

    def _sample(
        self, jobs: Sequence[tuple[Prompt, int]], role: Role, context: bool, advance: Advance
    ) -> list[Rollout]:
        training, evaluation = self.config.orchestrator.sampling, self.settings.sampling
        requests = [
            Request(
                prompt.ids(role, context=context),
                stable_seed(self.config.seed, "eval", prompt.env, prompt.task.id, sample),
            )
            for prompt, sample in jobs
        ]
        params = SamplingParams(
            max_tokens=evaluation.max_tokens or training.max_tokens,
            temperature=training.temperature
            if evaluation.temperature is None
            else evaluation.temperature,
        )
        completions = self.engine.generate(requests, params, role, advance)
        name = named(jobs, "evaluation rollout")
        check_completions(self.engine, completions, len(jobs), params, name)
        return [
            Rollout(prompt, sample, c, self.builder.decode(c.token_ids))
            for (prompt, sample), c in zip(jobs, completions, strict=True)
        ]

    def held_out(self) -> list[Prompt]:
        """The prompts for the held-out KL."""
        return held_out(self.prompts)
