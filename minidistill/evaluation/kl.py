"""The KL to the teacher by prompt, and the drift on unrelated prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.config import Config
from minidistill.engines.base import Engine, Ids
from minidistill.engines.checks import check_completions, check_scores
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.unrelated import DRIFT_TOKENS, unrelated_prompts
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Completion, Prompt, Request, Role, SamplingParams, TeacherScores

Views = tuple[Sequence[Ids], Sequence[Ids]]
"""The prompts that each of two distributions reads."""


@dataclass(frozen=True, slots=True)
class SampledKL:
    """A KL by prompt, and the completions that it was measured on."""

    by_prompt: PromptSums
    completions: list[Completion]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.by_prompt.mean


def teacher_kl(
    config: Config,
    policy: Policy,
    engine: Engine,
    prompts: Sequence[Prompt],
    budget: TokenBudget,
    *,
    label: str = "held-out",
    max_tokens: int | None = None,
) -> SampledKL:
    """KL(student‖teacher) over completions that the student samples without the context.

    If only an engine holds the teacher's weights, it is log π(y) - log q(y) instead. Otherwise an
    engine on the trainer's GPU is asleep after the call. `budget` bounds the passes. The seeds
    follow from `label`. `max_tokens` is by default that of training.
    """
    longest = max_tokens or config.orchestrator.sampling.max_tokens
    views = ([p.student_ids for p in prompts], [p.teacher_ids for p in prompts])
    completions = sample(config, engine, views[0], label, Role.STUDENT, longest)
    roles = Role.STUDENT, Role.TEACHER
    if policy.holds(Role.TEACHER):
        engine.sleep()
        doing = f"computing the KL on {label} prompts"
        return _exact_kl(config, policy, completions, views, roles, budget, doing)
    return _sampled_kl(engine, completions, views, roles)


def drift_kl(
    config: Config, policy: Policy, engine: Engine, builder: PromptBuilder, budget: TokenBudget
) -> float | None:
    """Mean KL(base‖student), nats, over the base's completions of unrelated prompts.

    0 means that training changed nothing outside the task. None if the base's weights no longer
    exist (all weights were trained, and the teacher is not the base), or if nothing can sample from
    them. `budget` bounds the passes.
    """
    view = [prompt.student_ids for prompt in unrelated_prompts(builder)]
    # under LoRA the student's engine has the base too
    served = policy.teacher_weights is Weights.BASE and (policy.lora or not policy.holds(Role.BASE))
    if policy.holds(Role.BASE) and policy.can_sample:
        engine.sleep()
        engine = EmbeddedEngine(policy, PrefixCache(policy, shares=False))
    elif not served:
        return None
    completions = sample(config, engine, view, "drift", Role.BASE, DRIFT_TOKENS)
    roles = Role.BASE, Role.STUDENT
    if policy.holds(Role.BASE):
        engine.sleep()
        doing = "computing the drift on unrelated prompts"
        return _exact_kl(config, policy, completions, (view, view), roles, budget, doing).mean
    return _sampled_kl(engine, completions, (view, view), roles).mean


def sample(
    config: Config, engine: Engine, view: Sequence[Ids], label: str, role: Role, max_tokens: int
) -> list[Completion]:
    """One completion of each prompt, with seeds that follow from `label` and its place."""
    requests = [
        Request(tuple(prompt), stable_seed(config.seed, label, index))
        for index, prompt in enumerate(view)
    ]
    params = SamplingParams(max_tokens, config.orchestrator.sampling.temperature)
    completions = engine.generate(requests, params, role)
    check_completions(engine, completions, len(view), params, lambda i: f"{label} prompt {i}")
    return completions


def _exact_kl(
    config: Config,
    policy: Policy,
    completions: list[Completion],
    views: Views,
    roles: tuple[Role, Role],
    budget: TokenBudget,
    doing: str,
) -> SampledKL:
    kl_N = token_kl(
        policy,
        [c.token_ids for c in completions],
        prompts=views,
        roles=roles,
        temperature=config.orchestrator.sampling.temperature,
        budget=budget,
        doing=doing,
    ).double()
    tokens = [len(c.token_ids) for c in completions]
    sums = [float(part.sum()) for part in kl_N.split(tokens)]
    return SampledKL(PromptSums(float(kl_N.mean()), sums, tokens), completions)


def _score(
    engine: Engine, view: Sequence[Ids], completions: Sequence[Ids], role: Role
) -> list[list[float]]:
    logprobs = engine.score(view, completions, role)
    scores = [TeacherScores(row) for row in logprobs]
    check_scores(engine, scores, completions, lambda i: f"prompt {i} as the {role.value}")
    return logprobs


def _sampled_kl(
    engine: Engine, completions: list[Completion], views: Views, roles: tuple[Role, Role]
) -> SampledKL:
    """The one-sample estimate, from log-probs of the sampled tokens at temperature 1."""
    ids = [c.token_ids for c in completions]
    first, second = (
        [sum(logprobs) for logprobs in _score(engine, view, ids, role)]
        for view, role in zip(views, roles, strict=True)
    )
    tokens = list(map(len, ids))
    mean = (sum(first) - sum(second)) / sum(tokens)
    sums = [p - q for p, q in zip(first, second, strict=True)]
    return SampledKL(PromptSums(mean, sums, tokens), completions)
