"""What an evaluation is of: the tasks, seeds and sampling settings, the same for all sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from minidistill.config import Config
from minidistill.config.load import read_file
from minidistill.config.orchestrator import EnvConfig, EvalConfig, EvalSamplingConfig
from minidistill.config.overrides import parse_value
from minidistill.config.schema_tree import ANY
from minidistill.errors import UserError
from minidistill.export.source import NO_ENVIRONMENT, Source
from minidistill.reporting.records import first_problem

_CONTEXTS = ("context", "context_file", "contexts", "examples")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for. None: as the first run among the sources has it."""

    env: str | None = None
    """An environment's id, or a TOML file with environments."""
    args: str | None = None
    """A TOML or JSON table, of an environment's id."""
    tasks: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None


def align(sources: Sequence[Source], asked: Asked) -> list[Source]:
    """The sources, each with the tasks, seed and sampling settings of the first run among them.

    What its prompts look like stays its own: model, template and context. Raises UserError if no
    environment is known.
    """
    first = next((s for s in sources if s.kind == "run"), sources[0]).config
    orchestrator = first.orchestrator
    settings = orchestrator.eval or EvalConfig()
    envs = environments(asked) or settings.env or orchestrator.env
    if envs[0].id == NO_ENVIRONMENT:
        raise UserError(
            f"{sources[0].run} is no run, so there are no tasks to evaluate it on",
            where="--env",
            fix="give an environment: --env ID --args TABLE, or --env FILE.toml",
        )
    sampling, own = orchestrator.sampling, settings.sampling
    temperature, max_tokens = asked.temperature, asked.max_tokens
    if temperature is None:
        temperature = sampling.temperature if own.temperature is None else own.temperature
    settings = settings.model_copy(
        update={
            "num_examples": asked.tasks or settings.num_examples,
            "sampling": EvalSamplingConfig(
                temperature=temperature,
                max_tokens=max_tokens or own.max_tokens or sampling.max_tokens,
            ),
        }
    )
    if max_tokens:
        sampling = sampling.model_copy(update={"max_tokens": max_tokens})
    shared = {
        "sampling": sampling,
        "max_env_error_frac": orchestrator.max_env_error_frac,
        "overlong": orchestrator.overlong,
    }
    return [
        replace(source, config=_aligned(source.config, settings, envs, shared, first.seed))
        for source in sources
    ]


def _aligned(
    config: Config,
    settings: EvalConfig,
    envs: Sequence[EnvConfig],
    shared: dict[str, Any],
    seed: int,
) -> Config:
    orchestrator = config.orchestrator
    own = {env.name: env for env in orchestrator.env}
    evaluated = [_with_contexts(env, own.get(env.name)) for env in envs]
    teacher = orchestrator.teacher_model.model_copy(update={"eval_baseline": False})
    update = {
        **shared,
        "eval": settings.model_copy(update={"env": evaluated}),
        "teacher_model": teacher,
    }
    orchestrator = orchestrator.model_copy(update=update)
    return config.model_copy(update={"orchestrator": orchestrator, "seed": seed})


def _with_contexts(env: EnvConfig, own: EnvConfig | None) -> EnvConfig:
    """The environment with the contexts that a run gives to that of this name, if it has one."""
    return env.model_copy(update={key: own and getattr(own, key) for key in _CONTEXTS})


def environments(asked: Asked) -> list[EnvConfig]:
    """The environments that the command line names; empty if it names none. Raises UserError."""
    if asked.env is None:
        if asked.args is not None:
            what = "--args are those of an environment, and none is given"
            raise UserError(what, "--args", "add --env ID")
        return []
    if not asked.env.endswith(".toml"):
        return [_environment({"id": asked.env, "args": _table(asked.args)}, "--env, --args")]
    if asked.args is not None:
        what = f"--args are those of an environment, and {asked.env} is a file"
        raise UserError(what, "--args", "write them in the file, or give the environment's id")
    data, _ = read_file(asked.env)
    orchestrator = data.get("orchestrator")
    tables: Any = None
    if isinstance(orchestrator, dict):
        evaluation = orchestrator.get("eval")
        tables = evaluation.get("env") if isinstance(evaluation, dict) else None
        tables = tables or orchestrator.get("env")
    if not (isinstance(tables, list) and tables):
        raise UserError(
            f"{asked.env} configures no environment",
            where=asked.env,
            fix="add a table [[orchestrator.env]] with an id",
        )
    return [_environment(table, asked.env) for table in tables]


def _environment(table: Any, where: str) -> EnvConfig:
    try:
        return EnvConfig.model_validate(table)
    except ValidationError as error:
        what = f"the environment cannot be used: {first_problem(error)}"
        raise UserError(what, where, "see docs/configuration.md") from None


def _table(text: str | None) -> dict[str, Any]:
    value = {} if text is None else parse_value(text, ANY)
    if not isinstance(value, dict):
        raise UserError(
            "--args is no table", "--args", "write TOML or JSON: '{ path = \"prompts.jsonl\" }'"
        )
    return value
