"""Preparing a run: every check that needs no weights. Nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from minidistill.config import Config, LoadedConfig
from minidistill.config.adapter import initial_adapter_digest
from minidistill.driver import preflight, selection
from minidistill.driver.resume import is_extended
from minidistill.driver.self_prompts import SelfPrompts
from minidistill.envs.isolated import close_environments
from minidistill.envs.multi_turn import multi_turn
from minidistill.envs.protocol import Environment, check_ready, has_rewards
from minidistill.envs.registry import load_environments
from minidistill.evaluation.evaluator import held_out
from minidistill.evaluation.intervals import MIN_TASKS
from minidistill.evaluation.verdict import ENOUGH_TASKS, NO_BASELINE, points, too_few
from minidistill.models.hub import load_teacher_tokenizer, load_tokenizer
from minidistill.models.weights import check_weights, refuse_adapters
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import Machine
from minidistill.placement.placement import origins
from minidistill.placement.planner import plan_run
from minidistill.placement.render import refusal
from minidistill.reporting.monitors import check_monitors
from minidistill.reporting.run_directory import RunDirectory
from minidistill.tasks.chat_template import TemplateSettings
from minidistill.tasks.contexts import Contexts
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.measuring import Measurer, no_progress, refuse_empty
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_rewards
from minidistill.tasks.sampling import Fingerprint
from minidistill.trainer.checkpoint import any_saved
from minidistill.types import Context, Phase, Prompt, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has passed its checks. Nothing is written, and no weights are loaded."""

    loaded: LoadedConfig
    resume: bool
    extended: bool
    """The run is resumed with more steps than it was started with."""
    directory: RunDirectory
    tokenizer: Any
    environments: Mapping[str, Environment]
    train_tasks: Mapping[str, Sequence[Task]]
    """By environment, without those that are too long."""
    evaluation_environments: Mapping[str, Environment]
    evaluation_prompts: Mapping[str, Sequence[Prompt]]
    """By environment; empty if the run does not evaluate."""
    builder: PromptBuilder
    prompts: Sequence[Prompt]
    """The first ones, for the checks of the model."""
    contexts: Sequence[tuple[int, ...]]
    """See `Measured`."""
    shown_contexts: Sequence[Context]
    """See `Measured`."""
    context_count: int
    """How many different contexts the prompts have."""
    fingerprint: str
    """Of the tasks and prompts: a resumed run must have the same."""
    restores: bool
    """The weights are those of a checkpoint, and not of an adapter that the run started from."""
    initial_adapter: str | None
    """A hash of the adapter that the run starts from. None: a new one, or every weight."""
    plan: Plan

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def all_environments(self) -> list[Environment]:
        return _each_once(*self.environments.values(), *self.evaluation_environments.values())

    @property
    def scored_environments(self) -> list[Environment]:
        """Those whose completions are scored, in training or evaluations."""
        return _scored(self.config, self.environments, self.evaluation_environments)


def prepare(
    loaded: LoadedConfig, directory: RunDirectory, resume: bool, phase: Phase = no_progress
) -> Prepared:
    """Check everything that can be checked without the model's weights.

    `phase` shows the progress of checks that take long.

    Raises UserError for errors the user can fix. The environments are closed then.
    """
    made: list[Environment] = []
    try:
        return _prepare(loaded, directory, resume, phase, made)
    except BaseException:
        close_environments(made)
        raise


def _prepare(
    loaded: LoadedConfig,
    directory: RunDirectory,
    resume: bool,
    phase: Phase,
    made: list[Environment],
) -> Prepared:
    """See `prepare`. Adds the environments to `made`."""
    config, orchestrator = loaded.config, loaded.config.orchestrator
    extended = resume and is_extended(loaded, directory)
    restores = resume and any_saved(directory.path / "checkpoints")
    initial_adapter = None if restores else initial_adapter_digest(config)
    if resume and not restores:
        directory.check_same_adapter(initial_adapter)
    check_monitors(config)
    refuse_adapters(config)
    tokenizer = load_tokenizer(config)
    environments = load_environments(orchestrator.env, "orchestrator.env")
    made += environments.values()
    check_rewards(config, environments)
    began = directory.began() if resume else None
    builder = prompt_builder(config, tokenizer, began or datetime.now())
    plan = _plan(loaded)
    _check_memory(loaded, plan)
    writer = SelfPrompts(config, tokenizer, builder, plan.placement, phase)
    written = writer.environments(orchestrator.env, "orchestrator.env")
    made += written.values()
    environments |= written
    evaluated = environments
    if orchestrator.eval is not None and orchestrator.eval.env is not None:
        evaluated = load_environments(orchestrator.eval.env, "orchestrator.eval.env")
        made += evaluated.values()
        written = writer.environments(orchestrator.eval.env, "orchestrator.eval.env")
        made += written.values()
        evaluated |= written
    builder.contexts = Contexts.of(config, environments, evaluated)
    first = _first_prompts(environments, builder)
    preflight.check_prompts(config, builder, first)
    preflight.check_conversations(builder, environments, first)
    if orchestrator.eval is not None:
        check_rewards(config, evaluated, evaluated=True)
        selection.check(config, evaluated)
        if evaluated is not environments:
            first = _first_prompts(evaluated, builder)
            preflight.check_conversations(builder, evaluated, first)
    limit = PromptLimit.of(config, plan.placement.max_length)
    eval_limit = PromptLimit.of(config, plan.placement.max_length, evaluation=True)
    measurer = Measurer(builder, orchestrator.overlong, phase)
    measured = measurer.measure(environments, limit, eval_limit)
    fingerprint = measured.fingerprint
    by_env: dict[str, Sequence[Prompt]] = {}
    if orchestrator.eval is not None:
        tasks = measured.eval
        if orchestrator.eval.env is not None:
            digest = Fingerprint(evaluated)
            tasks = {
                name: measurer.fitting(name, env.eval, eval_limit, lambda p, fits: digest.add(p))
                for name, env in evaluated.items()
            }
            fingerprint += f"-{digest.hexdigest()}"
        by_env = evaluation_prompts(tasks, measurer, eval_limit, orchestrator.eval.num_examples)
    if resume:
        directory.check_same_tasks(fingerprint)
    _tell_what_the_scoreboard_lacks(config, evaluated, by_env)
    played = [*multi_turn(environments).values(), *multi_turn(evaluated).values()]
    for environment in _each_once(*_scored(config, environments, evaluated), *played):
        check_ready(environment)
    check_weights(config)  # last, because it may download them
    return Prepared(
        loaded=loaded,
        resume=resume,
        extended=extended,
        directory=directory,
        tokenizer=tokenizer,
        environments=environments,
        train_tasks=measured.train,
        evaluation_environments=evaluated,
        evaluation_prompts=by_env,
        builder=builder,
        prompts=measured.prompts,
        contexts=measured.contexts,
        shown_contexts=measured.shown,
        context_count=measured.context_count,
        fingerprint=fingerprint,
        restores=restores,
        initial_adapter=initial_adapter,
        plan=plan,
    )


def _scored(
    config: Config, trained: Mapping[str, Environment], evaluated: Mapping[str, Environment]
) -> list[Environment]:
    """Those whose completions are scored, in training or evaluations."""
    orchestrator = config.orchestrator
    return _each_once(
        *(() if orchestrator.buffer.skip_verification else trained.values()),
        *(() if orchestrator.eval is None else evaluated.values()),
    )


def _each_once(*environments: Environment) -> list[Environment]:
    return list({id(environment): environment for environment in environments}.values())


def prompt_builder(config: Config, tokenizer: Any, began: datetime) -> PromptBuilder:
    """Renders the run's prompts, with the date and time at which it `began`.

    Its `contexts` are the teacher's until the environments' are known.
    """
    teacher, model = config.orchestrator.teacher_model, config.model
    return PromptBuilder(
        tokenizer,
        teacher.context,
        teacher.context_placement,
        teacher_tokenizer=load_teacher_tokenizer(config, tokenizer),
        settings=TemplateSettings(model.chat_template_kwargs, began, model.special_tokens_in_text),
    )


def _plan(loaded: LoadedConfig) -> Plan:
    """Plan what runs where."""
    plan = plan_run(loaded, Machine.local())
    for warning in plan.warnings:
        logger.warning(warning)
    return plan


def _check_memory(loaded: LoadedConfig, plan: Plan) -> None:
    """Raise UserError (exit code 3) if the run does not fit, with what `plan` prints."""
    settings = tuple(choice.key for choice in plan.placement.choices)
    error = refusal(plan, origins(loaded, settings) or "model.name")
    if error is not None:
        raise error


def _tell_what_the_scoreboard_lacks(
    config: Config, environments: Mapping[str, Environment], by_env: Mapping[str, Sequence[Prompt]]
) -> None:
    """Warn before the run if its scoreboard will have no verdict, or a vague one."""
    settings = config.orchestrator.eval
    if settings is None:
        unused = [name for name, env in environments.items() if has_rewards(env)]
        if unused and config.orchestrator.buffer.skip_verification:
            logger.info(
                f"no reward of {', '.join(unused)} is computed: skip_verification leaves rewards "
                "out of training, and there is no [orchestrator.eval]"
            )
        logger.info(NO_BASELINE)
        return
    scored = config.orchestrator.teacher_model.eval_baseline
    count = sum(map(len, by_env.values()))
    if not scored:
        count = len(held_out(by_env))
    more = any(len(env.eval) > settings.num_examples for env in environments.values())
    fix = "raise orchestrator.eval.num_examples" if more else "give the environments more tasks"
    if count < MIN_TASKS:
        what = "task" if scored else "prompt"
        logger.warning(f"{too_few(count, what)} The scoreboard will have no percentage: {fix}.")
    elif scored and count < ENOUGH_TASKS:
        logger.info(
            f"{count} held-out tasks give a mean of 0s and 1s an interval of up to "
            f"±{points(count):.0f} points, {ENOUGH_TASKS} give ±{points(ENOUGH_TASKS):.0f}: {fix}"
        )


def _first_prompts(environments: Mapping[str, Environment], builder: PromptBuilder) -> list[Prompt]:
    """The first prompt of each environment, with all its contexts. Others are measured later."""
    for name, environment in environments.items():
        refuse_empty(name, environment.train)
    return [
        prompt
        for name, environment in environments.items()
        for prompt in builder.variants(name, environment.train[0])
    ]


def evaluation_prompts(
    tasks: Mapping[str, Sequence[Task]], measurer: Measurer, limit: PromptLimit, count: int
) -> dict[str, Sequence[Prompt]]:
    """The prompts of the first `count` tasks of each environment. Raises UserError."""
    by_env: dict[str, Sequence[Prompt]] = {}
    for name, split in tasks.items():
        chosen = measurer.take(name, split, min(count, len(split)))
        prompts = [measurer.builder.build(name, task) for task in chosen]
        by_env[name], dropped = measurer.fitting_prompts(prompts, limit)
        if dropped:
            logger.warning(f"left out {dropped} evaluation prompts of {name} that are too long")
    return by_env
