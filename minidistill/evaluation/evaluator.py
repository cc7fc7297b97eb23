"""Evaluations: rewards of both roles, KL on held-out prompts, drift on unrelated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minidistill.config import Config
from minidistill.engines.base import Advance, Engine, Request
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.envs import Environment, has_rewards
from minidistill.models.tiny_texts import CHAT
from minidistill.reporting.terminal import Display
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_errors, score
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import BASE, STUDENT, Policy, Role
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Completion, Prompt, Rollout, Task

UNRELATED = tuple(question for question, _ in CHAT)
HELD_OUT = 128  # prompts of the held-out KL
DRIFT_TOKENS = 32  # longest completion on an unrelated prompt


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean reward of each task by environment that has rewards, and the completions' length."""

    rewards: dict[str, list[float]]
    length: float


class Evaluator:
    """Evaluates on a fixed set of held-out tasks, with the same seeds every time.

    Equal seeds make the difference between two evaluations that of the models, not of the draws.
    """

    def __init__(
        self,
        config: Config,
        environments: Mapping[str, Environment],
        builder: PromptBuilder,
        engine: Engine,
        display: Display,
    ) -> None:
        assert config.orchestrator.eval is not None
        self.config, self.settings = config, config.orchestrator.eval
        self.environments, self.engine, self.display = environments, engine, display
        self.builder = builder
        count = self.settings.num_examples
        self.prompts = {
            name: [builder.build(name, env.eval[i]) for i in range(min(count, len(env.eval)))]
            for name, env in environments.items()
        }

    def run(self, label: str, *, student: bool, context: bool) -> Scores:
        """Sample and score every task, as the student or the teacher, without or with context."""
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
                part = jobs[start : start + self.settings.batch_size]
                rollouts += self._sample(part, student, context, advance)
        with self.display.phase("score", len(jobs), "rollouts") as advance:
            rewards, errors = score(self.environments, rollouts, advance)
        check_errors(errors, len(jobs), self.config.orchestrator.max_env_error_frac)
        if errors:
            text = f"{len(errors)} evaluation rollouts could not be scored: {errors[0]}"
            self.display.note(text, warning=True)
        by_env: dict[str, list[float]] = {
            name: [] for name in self.prompts if has_rewards(self.environments[name])
        }
        for start in range(0, len(jobs), samples):
            # a rollout that cannot be scored earns nothing, so that evaluations stay comparable
            earned = sum(r.value for r in rewards[start : start + samples] if r)
            if (name := jobs[start][0].env) in by_env:
                by_env[name].append(earned / samples)
        length = sum(len(r.completion.token_ids) for r in rollouts) / len(jobs)
        return Scores(by_env, length)

    def _sample(
        self, jobs: Sequence[tuple[Prompt, int]], student: bool, context: bool, advance: Advance
    ) -> list[Rollout]:
        sampling, own = self.config.orchestrator.sampling, self.settings.sampling
        requests = [
            Request(
                prompt.teacher_ids if context else prompt.student_ids,
                stable_seed(self.config.seed, "eval", prompt.env, prompt.task.id, sample),
            )
            for prompt, sample in jobs
        ]
        completions = self.engine.generate(
            requests,
            max_tokens=own.max_tokens or sampling.max_tokens,
            temperature=sampling.temperature if own.temperature is None else own.temperature,
            student=student,
            advance=advance,
        )
        return [
            Rollout(prompt, sample, c, self.builder.decode(c.token_ids))
            for (prompt, sample), c in zip(jobs, completions, strict=True)
        ]

    def held_out(self) -> list[Prompt]:
        """The prompts of the held-out KL, taken from each environment in turn."""
        share = max(1, HELD_OUT // len(self.prompts))
        return [prompt for prompts in self.prompts.values() for prompt in prompts[:share]]


def held_out_kl(config: Config, policy: Policy, engine: Engine, prompts: Sequence[Prompt]) -> float:
    """Mean KL(π‖q) over tokens that the student samples on held-out prompts.

    Where an engine has the teacher's weights, the mean of log π(y) - log q(y) over these tokens.
    """
    tokens = config.orchestrator.sampling.max_tokens
    views = ([p.student_ids for p in prompts], [p.teacher_ids for p in prompts])
    completions = _sample(config, engine, views[0], "held-out", student=True, max_tokens=tokens)
    if policy.holds(policy.teacher):
        return _mean_kl(config, policy, completions, views, (STUDENT, policy.teacher))
    return _sampled_kl(engine, completions, views, (True, False))


def drift_kl(
    config: Config, policy: Policy, engine: Engine, builder: PromptBuilder
) -> float | None:
    """Mean KL(base‖student) over what the base says on prompts that have nothing to do with it.

    0 would mean that training changed nothing but the task. None where nobody has the base's
    weights any more: all were trained, and the teacher is not the base.
    """
    tasks = [Task(str(i), ({"role": "user", "content": q},)) for i, q in enumerate(UNRELATED)]
    view = [builder.build("unrelated", task).student_ids for task in tasks]
    if policy.holds(BASE):
        engine = EmbeddedEngine(policy, PrefixCache(policy, shares=False), BASE)
    elif policy.teacher is not BASE:
        return None
    completions = _sample(config, engine, view, "drift", student=False, max_tokens=DRIFT_TOKENS)
    if policy.holds(BASE):
        return _mean_kl(config, policy, completions, (view, view), (BASE, STUDENT))
    return _sampled_kl(engine, completions, (view, view), (False, True))


def _sample(
    config: Config,
    engine: Engine,
    views: Sequence[tuple[int, ...]],
    label: str,
    *,
    student: bool,
    max_tokens: int,
) -> list[Completion]:
    requests = [
        Request(view, stable_seed(config.seed, label, index)) for index, view in enumerate(views)
    ]
    return engine.generate(
        requests,
        max_tokens=max_tokens,
        temperature=config.orchestrator.sampling.temperature,
        student=student,
    )


def _mean_kl(
    config: Config,
    policy: Policy,
    completions: Sequence[Completion],
    prompts: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    roles: tuple[Role, Role],
) -> float:
    kl_N = token_kl(
        policy,
        [c.token_ids for c in completions],
        prompts=prompts,
        roles=roles,
        temperature=config.orchestrator.sampling.temperature,
        budget=config.trainer.micro_batch_tokens,
    )
    return float(kl_N.double().mean())


def _sampled_kl(
    engine: Engine,
    completions: Sequence[Completion],
    prompts: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    student: tuple[bool, bool],
) -> float:
    """The estimate from the sampled tokens alone; both are scored, at temperature 1."""
    tokens = [c.token_ids for c in completions]
    sums = []
    for view, own in zip(prompts, student, strict=True):
        scores = engine.score(view, tokens, temperature=1.0, student=own)
        sums.append(sum(map(sum, scores)))
    return (sums[0] - sums[1]) / sum(map(len, tokens))
