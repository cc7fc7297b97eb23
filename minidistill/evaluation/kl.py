"""The KL on held-out prompts, and the drift on unrelated ones."""

from __future__ import annotations

from collections.abc import Sequence

from minidistill.config import Config
from minidistill.engines.base import Engine, Ids
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.evaluation.unrelated import UNRELATED
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.token_kl import token_kl
from minidistill.types import Completion, Prompt, Request, Role, SamplingParams, Task

DRIFT_TOKENS = 32  # longest completion on an unrelated prompt

Views = tuple[Sequence[Ids], Sequence[Ids]]
"""The prompts that each of two distributions reads."""


def held_out_kl(
    config: Config, policy: Policy, engine: Engine, prompts: Sequence[Prompt], budget: TokenBudget
) -> float:
    """Mean KL(student‖teacher), nats, over tokens that the student samples on held-out prompts.

    If only an engine holds the teacher's weights, it is the mean of log π(y) - log q(y) instead.
    Otherwise an engine on the trainer's GPU is asleep after the call. `budget` bounds the passes.
    """
    max_tokens = config.orchestrator.sampling.max_tokens
    views = ([p.student_ids for p in prompts], [p.teacher_ids for p in prompts])
    completions = _sample(config, engine, views[0], "held-out", Role.STUDENT, max_tokens)
    roles = Role.STUDENT, Role.TEACHER
    if policy.holds(Role.TEACHER):
        engine.sleep()
        doing = "computing the KL on held-out prompts"
        return _mean_kl(config, policy, completions, views, roles, budget, doing)
    return _sampled_kl(engine, completions, views, roles)


def drift_kl(
    config: Config, policy: Policy, engine: Engine, builder: PromptBuilder, budget: TokenBudget
) -> float | None:
    """Mean KL(base‖student), nats, over the base's completions of unrelated prompts.

    0 means that training changed nothing outside the task. None if the base's weights no longer
    exist: all weights were trained, and the teacher is not the base. `budget` bounds the passes.
    """
    tasks = [Task(str(i), ({"role": "user", "content": q},)) for i, q in enumerate(UNRELATED)]
    view = [builder.build("unrelated", task).student_ids for task in tasks]
    if policy.holds(Role.BASE) and policy.can_sample:
        engine.sleep()
        engine = EmbeddedEngine(policy, PrefixCache(policy, shares=False))
    elif policy.teacher_weights is not Weights.BASE:
        return None
    completions = _sample(config, engine, view, "drift", Role.BASE, DRIFT_TOKENS)
    roles = Role.BASE, Role.STUDENT
    if policy.holds(Role.BASE):
        engine.sleep()
        doing = "computing the drift on unrelated prompts"
        return _mean_kl(config, policy, completions, (view, view), roles, budget, doing)
    return _sampled_kl(engine, completions, (view, view), roles)


def _sample(
    config: Config, engine: Engine, view: Sequence[Ids], label: str, role: Role, max_tokens: int
) -> list[Completion]:
    requests = [
        Request(tuple(prompt), stable_seed(config.seed, label, index))
        for index, prompt in enumerate(view)
    ]
    params = SamplingParams(max_tokens, config.orchestrator.sampling.temperature)
    return engine.generate(requests, params, role)


def _mean_kl(
    config: Config,
    policy: Policy,
    completions: Sequence[Completion],
    views: Views,
    roles: tuple[Role, Role],
    budget: TokenBudget,
    doing: str,
) -> float:
    kl_N = token_kl(
        policy,
        [c.token_ids for c in completions],
        prompts=views,
        roles=roles,
        temperature=config.orchestrator.sampling.temperature,
        budget=budget,
        doing=doing,
    )
    return float(kl_N.double().mean())


def _sampled_kl(
    engine: Engine, completions: Sequence[Completion], views: Views, roles: tuple[Role, Role]
) -> float:
    """The one-sample estimate, from log-probs of the sampled tokens at temperature 1."""
    tokens = [c.token_ids for c in completions]
    sums = [
        sum(map(sum, engine.score(view, tokens, role)))
        for view, role in zip(views, roles, strict=True)
    ]
    return (sums[0] - sums[1]) / sum(map(len, tokens))
