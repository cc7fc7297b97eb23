"""Configurations and runs in Python: what the commands `run` and `bake` do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import tomli

from minidistill.api.run_object import Run
from minidistill.config import LoadedConfig
from minidistill.config.load import load_layers
from minidistill.config.overrides import Override, from_mapping
from minidistill.error_output import as_user_error
from minidistill.errors import EXIT_FAILED, EXIT_OK, UserError
from minidistill.system.foreign import ctrl_c, is_interrupt, was_interrupted
from minidistill.system.threads import before_torch

if TYPE_CHECKING:
    pass

Layer: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""A TOML file, the name of a configuration of the package, or settings as nested dicts."""
Configuration: TypeAlias = Layer | Sequence[Layer] | LoadedConfig
"""Layers, of which a later one beats an earlier one, or what `load_config` has returned."""


def load_config(config: Configuration, *, resume: bool = False, **settings: Any) -> LoadedConfig:
    """The validated configuration of files and settings, with the place where each is from.

    `settings` beat `config`. Their names are those of the command line: `max_steps=20`, a table as
    a dict, or dotted names in `**{"trainer.loss.adv_tau": 0.2}`; dotted names are also the keys of
    dicts in `config`. Paths in dicts are relative to the current directory, paths in a file to the
    file. With `resume` an adapter that the run started from may have gone.

    Raises UserError with the place of each error.
    """
    if isinstance(config, LoadedConfig):
        if not settings:
            return config
        layers: list[Layer] = [tomli.loads(config.text)]
    elif isinstance(config, str | os.PathLike | Mapping):
        layers = [config]
    else:
        layers = list(config)
    sources: list[str | list[Override]] = [
        from_mapping(layer) if isinstance(layer, Mapping) else os.fspath(layer) for layer in layers
    ]
    loaded = load_layers([*sources, from_mapping(settings)], resume=resume)
    # the run's directory has the name of its first file
    files = config.files if isinstance(config, LoadedConfig) else loaded.files
    return dataclasses.replace(loaded, files=files)


def run(
    config: Configuration, *, resume: bool = False, quiet: bool = False, **settings: Any
) -> Run:
    """Train, as `minidistill run` does, and return the finished run.

    `config` and `settings` are those of `load_config`. `resume` continues the run in `output_dir`,
    or the newest of this configuration. `quiet` shows the run's directory, warnings and the
    scoreboard only. On Ctrl-C the run stops after its step, is saved, and KeyboardInterrupt is
    raised: `resume` continues it. A second Ctrl-C stops at once; then `resume` continues from the
    last checkpoint.

    Raises UserError for errors that the user can fix; its `exit_code` is that of the command.
    """
    return _run(load_config(config, resume=resume, **settings), resume=resume, quiet=quiet)


def bake(
    model: str | os.PathLike[str],
    context: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Bake a context into an adapter of a model, as `minidistill bake` does.

    `context` is the text, or a file with it; `prompts` is a file of prompts, and without one the
    model writes them itself. `steps` is `max_steps`, `out` the run's directory. `resume`, `quiet`
    and `settings` are those of `run`.
    """
    before_torch()
    from minidistill.baking import bake_configuration

    plan = bake_configuration(
        os.fspath(model),
        Path(context) if isinstance(context, os.PathLike) else context,
        None if prompts is None else Path(prompts),
        steps,
        None if out is None else Path(out),
        settings,
        resume=resume,
    )
    return _run(plan.loaded, resume=resume, quiet=quiet)


def _run(loaded: LoadedConfig, *, resume: bool, quiet: bool) -> Run:
    before_torch()
    from minidistill.driver import loop
    from minidistill.reporting.terminal import open_display
    from minidistill.trainer.distributed.rank_group import launched_by_torchrun

    if launched_by_torchrun() is not None:
        raise UserError(
            "a run that torchrun starts cannot be started in Python",
            fix="torchrun … -m minidistill run FILES…",
        )
    directories: list[Path] = []
    try:
        with ctrl_c(), _outside_of_event_loops():
            code = loop.run(
                loaded,
                resume=resume,
                display=open_display(quiet=True) if quiet else None,
                claimed=directories.append,
            )
    except BaseException as error:
        if is_interrupt(error) or was_interrupted():
            raise _interrupted(directories) from error
        if isinstance(error, SystemExit):  # of an environment's code: it would end the notebook
            raise RuntimeError(f"something called sys.exit({error.code!r})") from error
        problem = as_user_error(error)
        if problem is error or problem.exit_code == EXIT_FAILED:  # nothing is known about it
            raise
        raise problem from error
    if code != EXIT_OK:
        raise _interrupted(directories)
    return Run(directories[-1])


@contextlib.contextmanager
def _outside_of_event_loops() -> Iterator[None]:
    """Hide the event loop in which a notebook's cells run: it would forbid the run its own ones."""
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        if loop is not None:
            asyncio.set_event_loop(loop)
        asyncio._set_running_loop(loop)


def _interrupted(directories: Sequence[Path]) -> KeyboardInterrupt:
    place = f" in {directories[-1]}" if directories else ""
    return KeyboardInterrupt(f"the run{place} was stopped; resume=True continues it")
