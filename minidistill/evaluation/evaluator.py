"""Evaluations on held-out tasks: rewards of the student and of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, named
from minidistill.envs.multi_turn import multi_turn
from minidistill.envs.protocol import Environment, has_rewards
from minidistill.evaluation.kl import Answer, sample
from minidistill.evaluation.side_by_side import kept
from minidistill.reporting.terminal.base import Display
from minidistill.rollouts.conversations import Played, Player, errors_of
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
        max_length: int,
    ) -> None:
        """`prompts` has those of each environment. A conversation may have `max_length` tokens."""
        assert config.orchestrator.eval is not None
        self.config, self.settings = config, config.orchestrator.eval
        self.environments, self.engine, self.display = environments, engine, display
        self.prompts, self.builder = prompts, builder
        self.max_length = max_length
        self.conversing = multi_turn(environments)

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
        errors: list[str] = []
        limit = self.config.orchestrator.max_env_error_frac

        def check(more: Sequence[str]) -> None:
            check_errors([*errors, *more], len(jobs), limit)

        rollouts: list[Rollout] = []
        with self.display.phase(f"evaluate {label}", len(jobs), "rollouts") as advance:
            for batch in self._batches(jobs, conversing=False):
                rollouts += self._sample(batch, role, context, advance)
            played = [
                each
                for batch in self._batches(jobs, conversing=True)
                for each in self._play(batch, role, context, advance, check)
            ]
        errors = errors_of(played)
        with self.display.phase("score", len(rollouts), "rollouts") as advance:
            scored, failed = score(self.environments, rollouts, advance, check)
        errors += failed
        check([])
        if errors:
            logger.warning(f"{len(errors)} evaluation rollouts could not be scored: {errors[0]}")
        of_played, of_single = (each.reward for each in played), iter(scored)
        rewards = [next(of_played if p.env in self.conversing else of_single) for p, _ in jobs]
        by_env: dict[str, list[float]] = {
            name: [] for name in self.prompts if has_rewards(self.environments[name])
        }
        for start in range(0, len(jobs), samples):
            # a rollout that cannot be scored counts as 0, so that evaluations stay comparable
            total = sum(r.value for r in rewards[start : start + samples] if r)
            if (name := jobs[start][0].env) in by_env:
                by_env[name].append(total / samples)
        completions = [r.completion for r in rollouts]
        completions += [sample.completion for each in played for sample in each.samples]
        tokens = sum(len(c.token_ids) for c in completions)
        return Scores(by_env, tokens / len(jobs))

    def _batches(
        self, jobs: Sequence[tuple[Prompt, int]], *, conversing: bool
    ) -> list[list[tuple[Prompt, int]]]:
        """The jobs of multi-turn environments, or the others, as they are sampled together."""
        chosen = [job for job in jobs if (job[0].env in self.conversing) == conversing]
        size = self.settings.batch_size
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def _params(self) -> SamplingParams:
        training, evaluation = self.config.orchestrator.sampling, self.settings.sampling
        return SamplingParams(
            max_tokens=evaluation.max_tokens or training.max_tokens,
            temperature=training.temperature
            if evaluation.temperature is None
            else evaluation.temperature,
        )

    def _play(
        self,
        jobs: Sequence[tuple[Prompt, int]],
        role: Role,
        context: bool,
        advance: Advance,
        check: Callable[[Sequence[str]], None],
    ) -> list[Played]:
        def seed(row: int, turn: int) -> int:
            prompt, sample = jobs[row]
            task = prompt.task.id
            return stable_seed(self.config.seed, "eval", prompt.env, task, sample, turn)

        player = Player(
            self.builder,
            self.conversing,
            self.max_length,
            self._params(),
            seed,
            role,
            context,
        )
        return player.play(self.engine, jobs, advance, check)

    def _sample(
        self, jobs: Sequence[tuple[Prompt, int]], role: Role, context: bool, advance: Advance
    ) -> list[Rollout]:
        requests = [
            Request(
                prompt.ids(role, context=context),
                stable_seed(self.config.seed, "eval", prompt.env, prompt.task.id, sample),
            )
            for prompt, sample in jobs
        ]
        params = self._params()
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

    def student_answers(self) -> list[Answer]:
        """The student's answers to the prompts for the held-out KL, sampled as in training."""
        return self._answers(self.held_out(), Role.STUDENT, context=False)

    def teacher_answers(self) -> list[Answer]:
        """The teacher's, with the context, to those of the prompts that are kept."""
        prompts = self.held_out()
        chosen = [prompts[i] for i in kept(len(prompts))]
        return self._answers(chosen, Role.TEACHER, context=True)

    def _answers(self, prompts: Sequence[Prompt], role: Role, *, context: bool) -> list[Answer]:
        training = self.config.orchestrator.sampling
        talking = [i for i, prompt in enumerate(prompts) if prompt.env in self.conversing]
        others = [i for i, prompt in enumerate(prompts) if prompt.env not in self.conversing]
        found: dict[int, Answer] = {}
        if talking:
            player = Player(
                self.builder,
                self.conversing,
                self.max_length,
                SamplingParams(training.max_tokens, training.temperature),
                lambda row, turn: stable_seed(self.config.seed, "held-out", talking[row], turn),
                role,
                context,
                rewarded=False,
            )
            # the teacher's are shown and no more, and of a few one failure is a large share
            limit = self.config.orchestrator.max_env_error_frac if role is Role.STUDENT else 1.0

            def check(errors: Sequence[str]) -> None:
                check_errors(errors, len(talking), limit)

            jobs = [(prompts[i], 0) for i in talking]
            played = player.play(self.engine, jobs, lambda count: None, check)
            check(errors_of(played))
            for i, each in zip(talking, played, strict=True):
                found[i] = Answer([(s.prompt, s.completion) for s in each.samples], each.text)
        if others:
            view = [prompts[i].ids(role, context=context) for i in others]
            arguments = "held-out", role, training.max_tokens
            completions = sample(self.config, self.engine, view, *arguments)
            for i, completion in zip(others, completions, strict=True):
                text = self.builder.decode(completion.token_ids)
                found[i] = Answer([(prompts[i], completion)], text)
        return [found[i] for i in range(len(prompts))]
