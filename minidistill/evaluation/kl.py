"""The KL to the teacher by prompt, and the drift on unrelated prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
Samples = Sequence[Sequence[tuple[Prompt, Completion]]]
"""Of each prompt."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered to a prompt: a completion, or a conversation."""

    samples: Sequence[tuple[Prompt, Completion]]
    """None if the conversation failed."""
    text: str
    """Of a conversation with what the environment wrote in it."""


@dataclass(frozen=True, slots=True)
class SampledKL:
    """A KL by prompt, and the texts that it was measured on."""

    by_prompt: PromptSums
    texts: list[str]
    """Empty unless answers were given."""
    prompts: Sequence[Prompt] = ()
    """What was answered with these. That of a program is only known when it asks."""

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
    answers: Sequence[Answer] | None = None,
    prefixes: PrefixCache | None = None,
) -> SampledKL:
    """KL(student‖teacher) over completions that the student samples without the context.

    If its `answers` to the prompts are given, they are not sampled here.

    If only an engine holds the teacher's weights, it is log π(y) - log q(y) instead. Otherwise an
    engine on the trainer's GPU is asleep after the call. `budget` bounds the passes. The seeds
    follow from `label`. `max_tokens` is by default that of training. `prefixes` is as for
    `token_kl`.
    """
    if answers is None:
        longest = max_tokens or config.orchestrator.sampling.max_tokens
        view = [p.student_ids for p in prompts]
        sampled = sample(config, engine, view, label, Role.STUDENT, longest)
        samples: Samples = [[pair] for pair in zip(prompts, sampled, strict=True)]
    else:
        samples = [answer.samples for answer in answers]
    pairs = [pair for of_prompt in samples for pair in of_prompt]
    views = ([p.student_ids for p, _ in pairs], [p.teacher_ids for p, _ in pairs])
    completions = [completion for _, completion in pairs]
    roles = Role.STUDENT, Role.TEACHER
    if policy.holds(Role.TEACHER):
        engine.sleep()
        doing = f"computing the KL on {label} prompts"
        kl = _exact_kl(config, policy, completions, views, roles, budget, doing, prefixes)
    else:
        kl = _sampled_kl(engine, completions, views, roles)
    asked = [of[0][0] if of else prompt for of, prompt in zip(samples, prompts, strict=True)]
    return SampledKL(_by_prompt(kl, samples), [answer.text for answer in answers or ()], asked)


def _by_prompt(kl: PromptSums, samples: Samples) -> PromptSums:
    """The KL of all samples, by prompt."""
    ends = list(accumulate(map(len, samples)))
    parts = [slice(end - len(of), end) for end, of in zip(ends, samples, strict=True)]
    sums = [sum(kl.sums[part]) for part in parts]
    return PromptSums(kl.mean, sums, [sum(kl.tokens[part]) for part in parts])


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
    prefixes: PrefixCache | None = None,
) -> PromptSums:
    kl_N = token_kl(
        policy,
        [c.sequence for c in completions],
        predicted=[c.sampled_at for c in completions],
        prompts=views,
        roles=roles,
        temperature=config.orchestrator.sampling.temperature,
        budget=budget,
        doing=doing,
        prefixes=prefixes,
    ).double()
    tokens = [len(c.token_ids) for c in completions]
    sums = [float(part.sum()) for part in kl_N.split(tokens)]
    return PromptSums(float(kl_N.mean()), sums, tokens)


def _score(
    engine: Engine, view: Sequence[Ids], completions: Sequence[Completion], role: Role
) -> list[list[float]]:
    """The log-probs of the sampled tokens."""
    sequences = [c.sequence for c in completions]
    logprobs = engine.score(view, sequences, role)
    scores = [TeacherScores(row) for row in logprobs]
    check_scores(engine, scores, sequences, lambda i: f"prompt {i} as the {role.value}")
    return [[row[i] for i in c.sampled_at] for row, c in zip(logprobs, completions, strict=True)]


def _sampled_kl(
    engine: Engine, completions: list[Completion], views: Views, roles: tuple[Role, Role]
) -> PromptSums:
    """The one-sample estimate, from log-probs of the sampled tokens at temperature 1."""
    first, second = (
        [sum(logprobs) for logprobs in _score(engine, view, completions, role)]
        for view, role in zip(views, roles, strict=True)
    )
    tokens = [len(c.token_ids) for c in completions]
    mean = (sum(first) - sum(second)) / sum(tokens)
    sums = [p - q for p, q in zip(first, second, strict=True)]
    return PromptSums(mean, sums, tokens)
