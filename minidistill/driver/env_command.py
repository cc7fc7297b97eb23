"""What `minidistill env check` and `minidistill env prompts` do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from minidistill import logs
from minidistill.config import LoadedConfig, load_config, shipped
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver.base_engine import base_engine
from minidistill.driver.env_check import check_environment
from minidistill.driver.env_report import Report
from minidistill.driver.prepare import prompt_builder
from minidistill.driver.self_prompts import SelfPrompts
from minidistill.engines.base import Engine
from minidistill.envs.isolated import close_environments
from minidistill.envs.registry import known_environments, load_environments
from minidistill.envs.self_prompts import ID as SELF_PROMPTS
from minidistill.errors import EXIT_FAILED, EXIT_OK, UserError, printable
from minidistill.models.hub import load_tokenizer
from minidistill.models.weights import check_weights
from minidistill.placement.machine import Machine
from minidistill.placement.planner import plan_run
from minidistill.tasks.contexts import Contexts
from minidistill.tasks.prompts import PromptBuilder

CONTEXT = "The context that this check gives the teacher.\n\n"
"""Of a check without a configuration."""
_ARGS = "orchestrator.env.0.args"
_MARKS = {True: "ok", False: "FAILED", None: "-"}


def check_environments(
    argv: Sequence[str], samples: int, *, with_model: bool, as_data: bool
) -> int:
    """Check the environment or the configuration that `argv` begins with, and print what is found.

    With `with_model` the model plays conversations too, for which it is loaded.
    Returns exit code 1 if a check fails. Raises UserError if an environment cannot be loaded.
    """
    loaded = load_config(_flags(argv))
    with _notes():
        reports = _reports(loaded, samples, with_model)
    if as_data:
        rows = [{**dataclasses.asdict(report), "passed": report.passed} for report in reports]
        print(json.dumps(rows, indent=2))
    else:
        _show(reports, loaded.config.model.name)
    sys.stdout.flush()
    return EXIT_OK if all(report.passed for report in reports) else EXIT_FAILED


def write_prompts(argv: Sequence[str]) -> int:
    """Write the files of a configuration's `self-prompts`, and print their paths."""
    loaded = load_config(argv)
    with _notes():
        tokenizer, builder = _views(loaded)
        writer = _writer(loaded, tokenizer, builder)
        paths = [
            env.args["path"]
            for where, envs in _tables(loaded)
            for env in writer.with_files(envs, where)
            if env.id == SELF_PROMPTS
        ]
    if not paths:
        raise UserError(
            "the configuration has no self-prompts",
            where="orchestrator.env",
            fix=f'set the id of an environment to "{SELF_PROMPTS}"',
        )
    for path in dict.fromkeys(paths):
        print(printable(path))
    sys.stdout.flush()
    return EXIT_OK


def _flags(argv: Sequence[str]) -> list[str]:
    """The arguments of `env check` as those of `load_config`."""
    first, *rest = argv
    if first.startswith("@") or first.endswith(".toml"):
        return list(argv)
    if first not in known_environments() and shipped.is_plain(first) and first in shipped.names():
        return list(argv)
    flags, has_context = [], False
    for token in rest:
        if token == "--args" or token.startswith(("--args.", "--args=")):
            token = f"--{_ARGS}{token.removeprefix('--args')}"
        flags.append(token)
        is_file = not token.startswith("-") and token.endswith(".toml")
        has_context |= is_file or token.startswith("--orchestrator.teacher_model.context")
    # as a whole, because a configuration's first environment may have other arguments
    flags.insert(0, f"--orchestrator.env=[{{id = {json.dumps(first)}}}]")
    if not has_context:
        flags.insert(0, f"--orchestrator.teacher_model.context={CONTEXT}")
    return flags


def _reports(loaded: LoadedConfig, samples: int, with_model: bool) -> list[Report]:
    config = loaded.config
    tokenizer, builder = _views(loaded)
    reports = []
    model = _model(loaded, tokenizer, builder) if with_model else None
    for where, envs in _tables(loaded):
        environments = load_environments(envs, where)
        try:
            if any(env.id == SELF_PROMPTS for env in envs):
                writer = _writer(loaded, tokenizer, builder)
                envs = writer.with_files(envs, where)
                written = [env for env in envs if env.id == SELF_PROMPTS]
                environments |= load_environments(written, where)
            builder.contexts = Contexts.of(config, environments, {})
            for env in envs:
                environment = environments[env.name]
                report = check_environment(config, env, environment, builder, samples, model)
                reports.append(report)
        finally:
            close_environments(environments.values())
    return reports


def _tables(loaded: LoadedConfig) -> list[tuple[str, list[EnvConfig]]]:
    """The lists of environments of a configuration, by their keys."""
    orchestrator = loaded.config.orchestrator
    tables = [("orchestrator.env", orchestrator.env)]
    if orchestrator.eval is not None and orchestrator.eval.env is not None:
        tables.append(("orchestrator.eval.env", orchestrator.eval.env))
    return tables


def _views(loaded: LoadedConfig) -> tuple[Any, PromptBuilder]:
    tokenizer = load_tokenizer(loaded.config)
    return tokenizer, prompt_builder(loaded.config, tokenizer, datetime.now())


def _model(loaded: LoadedConfig, tokenizer: Any, builder: PromptBuilder) -> Engine:
    check_weights(loaded.config)
    placement = plan_run(loaded, Machine.local()).placement
    return base_engine(loaded.config, tokenizer, placement, builder.end_of_turn_ids)


def _writer(loaded: LoadedConfig, tokenizer: Any, builder: PromptBuilder) -> SelfPrompts:
    placement = plan_run(loaded, Machine.local()).placement
    return SelfPrompts(loaded.config, tokenizer, builder, placement)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Notes and warnings go to standard error, which leaves the output to what is asked for."""

    def note(text: str, is_warning: bool) -> None:
        print(printable(f"warning: {text}" if is_warning else text), file=sys.stderr)

    with logs.to_terminal(note):
        yield


def _show(reports: Sequence[Report], model: str) -> None:
    for report in reports:
        print(printable(f"{report.env}, with the chat template of {model}"))
        for finding in report.findings:
            line = f"  {_MARKS[finding.passed]:<7} {finding.name:<14} {finding.detail}"
            print(printable(line))
