"""Scores of trained weights on held-out tasks, with intervals, and compared task by task."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver.model_checks import DOING, check_model
from minidistill.driver.prepare import evaluation_prompts
from minidistill.driver.self_prompts import SelfPrompts
from minidistill.envs.isolated import IsolatedEnvironment, close_environments
from minidistill.envs.protocol import Environment, check_ready, has_rewards
from minidistill.envs.registry import load_environments
from minidistill.envs.self_prompts import ID as SELF_PROMPTS
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.evaluation.evaluator import Evaluator, Scores
from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.kl import teacher_kl
from minidistill.export.source import Source
from minidistill.look.figures import Evaluation, Figure, Result
from minidistill.look.model import Model, load
from minidistill.look.views import (
    BASE,
    BASE_IN_CONTEXT,
    STUDENT,
    STUDENT_IN_CONTEXT,
    View,
    unknown_context,
)
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.tasks.contexts import Contexts
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import Measurer
from minidistill.trainer.forward import PrefixCache, common_prefix
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.policy import Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Prompt, Role

Environments = Mapping[str, Environment]
Prompts = Mapping[str, Sequence[Prompt]]
TEACHER = View("teacher in context", Role.TEACHER, True)
"""Of a run whose teacher is another model."""
SMALLER = {"where": "orchestrator.eval.batch_size", "fix": "lower --max-tokens, or the batch size"}


def evaluate(sources: Sequence[Source], names: Sequence[str], *, with_context: bool) -> Evaluation:
    """Evaluate the sources, which `align` has given the same tasks. Raises UserError."""
    config = sources[0].config
    settings = config.orchestrator.eval
    assert settings is not None
    assert settings.env is not None
    loaded = _load(settings.env)
    results: list[Result] = []
    tasks: dict[str, list[str]] = {}
    done: set[object] = set()
    try:
        for source, name in zip(sources, names, strict=True):
            model = load(source, teacher=True)
            if not tasks and any(env.id == SELF_PROMPTS for env in settings.env):
                loaded |= _written(model, config)
            order = {env.name: loaded[env.name] for env in settings.env}
            prompts = _prompts(model, order)
            found = {env: [p.task.id for p in rows] for env, rows in prompts.items()}
            if tasks and found != tasks:
                raise UserError(
                    f"{name} leaves out other prompts than {names[0]}, because they are too long",
                    where=name,
                    fix="evaluate it alone, or on shorter prompts",
                )
            tasks = found
            results += _evaluate(model, name, order, prompts, done, with_context=with_context)
            del model  # before the next one is loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        close_environments(loaded.values())
    sampling = settings.sampling
    assert sampling.temperature is not None
    assert sampling.max_tokens is not None
    return Evaluation(
        tasks,
        config.seed,
        settings.rollouts_per_example,
        sampling.temperature,
        sampling.max_tokens,
        results,
    )


# -- tasks -----------------------------------------------------------------------------------------


def _load(envs: Sequence[EnvConfig]) -> dict[str, Environment]:
    known = [env for env in envs if env.id != SELF_PROMPTS]
    try:
        loaded = load_environments(known, "--env")
    except UserError as error:
        error.where = "--env, --args" if error.where.startswith("--env") else error.where
        raise
    try:
        for environment in loaded.values():
            if isinstance(environment, IsolatedEnvironment):
                environment.start()
            check_ready(environment)
        for environment in loaded.values():
            if isinstance(environment, IsolatedEnvironment):
                environment.check()
    except BaseException:
        close_environments(loaded.values())
        raise
    return loaded


def _written(model: Model, config: Config) -> dict[str, Environment]:
    """The environments of prompts that the first source's base writes, or has written."""
    settings = config.orchestrator.eval
    assert settings is not None
    assert settings.env is not None
    writer = SelfPrompts(model.config, model.tokenizer, model.builder, model.placement)
    return writer.environments(settings.env, "--env")


def _prompts(model: Model, environments: Environments) -> dict[str, Sequence[Prompt]]:
    """The held-out prompts, those that a run with these settings would evaluate on."""
    config, builder = model.config, model.builder
    settings = config.orchestrator.eval
    assert settings is not None
    builder.contexts = Contexts.of(config, environments, environments)
    limit = PromptLimit.of(config, model.placement.max_length, evaluation=True)
    measurer = Measurer(builder, config.orchestrator.overlong)
    tasks = {
        name: measurer.fitting(name, environment.eval, limit)
        for name, environment in environments.items()
    }
    return evaluation_prompts(tasks, measurer, limit, settings.num_examples)


# -- one source ------------------------------------------------------------------------------------


def _evaluate(
    model: Model,
    name: str,
    environments: Environments,
    prompts: Prompts,
    done: set[object],
    *,
    with_context: bool,
) -> Iterator[Result]:
    """The results of one source. `done` has the bases that were evaluated for another one."""
    config, source = model.config, model.source
    flat = [prompt for rows in prompts.values() for prompt in rows]
    envs = config.orchestrator.eval.env if config.orchestrator.eval else None
    programs = any(env.brings_context for env in envs or ())
    knows_context = programs or any(prompt.context.text for prompt in flat)
    if with_context and not knows_context:
        raise unknown_context(source)
    rewarded = any(map(has_rewards, environments.values()))
    if not knows_context and not rewarded:
        raise UserError(
            f"{', '.join(environments)} has no reward, and no context is known for {name}, so "
            "there is nothing to measure",
            where="--env",
            fix="give an environment with a reward, or --context FILE|TEXT for the KL to the "
            "base that reads it",
        )
    budget = TokenBudget(model.placement.micro_batch_tokens)
    prefixes = PrefixCache(model.policy, shares=True, contexts=_beginnings(flat))
    with explain_out_of_memory(DOING, **SMALLER):
        if not check_model(model.policy, flat, budget, prefixes=prefixes):
            prefixes = PrefixCache(model.policy, shares=False)
    model.engine.prefixes = prefixes
    display = PlainDisplay(sys.stderr)
    evaluator = Evaluator(
        config,
        environments,
        prompts,
        model.builder,
        model.engine,
        display,
        model.placement.max_length,
    )
    for view in _views(model, with_context=with_context) if rewarded else [STUDENT]:
        if view is not STUDENT and view is not STUDENT_IN_CONTEXT:
            # what the base's prompts and answers depend on
            read = tuple(p.ids(view.role, context=view.context) for p in flat)
            key = (view.name, source.base, config.model.revision, config.model.quantization, read)
            if key in done:
                continue
            done.add(key)
        scores, kl = Scores({}, 0.0), None
        if rewarded:
            scores = evaluator.run(f"{name} ({view.name})", view.role, context=view.context)
        if view is STUDENT and knows_context:
            with explain_out_of_memory("computing the KL on held-out prompts", **SMALLER):
                answers = evaluator.student_answers()
                held_out = evaluator.held_out()
                policy, engine = model.policy, model.engine
                measured = teacher_kl(config, policy, engine, held_out, budget, answers=answers)
                kl = measured.by_prompt
            if not rewarded:
                scores = Scores({}, sum(kl.tokens) / len(kl.tokens))
        yield _result(name, view.name, scores, kl, config.seed)


def _views(model: Model, *, with_context: bool) -> list[View]:
    if not with_context:
        return [STUDENT]
    teacher = TEACHER if model.policy.teacher_weights is Weights.OTHER else BASE_IN_CONTEXT
    if not model.source.knows_base:
        return [STUDENT, STUDENT_IN_CONTEXT]
    return [BASE, teacher, STUDENT, STUDENT_IN_CONTEXT]


def _beginnings(prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """What the prompts with each context begin with: see `Measured.contexts`."""
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.env, prompt.context.group), []).append(prompt.teacher_ids)
    all_of_them = [prompt.teacher_ids for prompt in prompts]
    return sorted({common_prefix(ids) for ids in (*groups.values(), all_of_them)})


def _result(name: str, view: str, scores: Scores, kl: PromptSums | None, seed: int) -> Result:
    figures = [value for values in scores.rewards.values() for value in values]
    known = [*figures, *(() if kl is None else (kl.mean, *kl.sums))]
    if not all(map(math.isfinite, known)):
        raise UserError(
            f"a score or a KL of {name} ({view}) is not a finite number",
            where=name,
            fix="see whether its weights, and the environment's scores, are finite",
            exit_code=EXIT_HEALTH,
        )
    return Result(
        name,
        view,
        Figure.of_values(figures, seed) if figures else None,
        {env: Figure.of_values(values, seed) for env, values in scores.rewards.items()},
        scores.rewards,
        scores.length,
        None if kl is None else Figure.of_kl(kl, seed),
    )
