"""What `--resume` may change: nothing but a larger number of steps, and only where the steps that
are done would have been the same in the longer run."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from minidistill.config import Config, LoadedConfig
from minidistill.config.adapter import with_recorded_shape
from minidistill.driver.selection import Selection
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.records import METRICS, first_problem
from minidistill.reporting.run_directory import RESOLVED, SCOREBOARD, RunDirectory, damaged
from minidistill.trainer.optim import rate_depends_on_max_steps

STEPS = "max_steps"
STOPPED = "stopped_early"
"""The scoreboard's key for why a run ended before `max_steps`, if it did."""


def with_recorded_adapter(loaded: LoadedConfig, directory: RunDirectory) -> LoadedConfig:
    """The configuration of a resumed run, if the adapter that it started from has gone."""
    try:
        config = with_recorded_shape(loaded.config, directory.resolved())
    except ValidationError as error:
        raise damaged(directory.path / RESOLVED, first_problem(error)) from None
    return replace(loaded, config=config)


def is_extended(loaded: LoadedConfig, directory: RunDirectory) -> bool:
    """Whether the run is resumed with more steps than it was started with, or goes on after its end
    because other settings of `early_stopping` would not have stopped it.

    Raises UserError for other changes, and if its learning rates depend on the number of steps.
    """
    changed = directory.changed_settings(loaded)
    others = sorted(key for key in changed if key != STEPS)
    if others:
        differences = ", ".join(
            f"{key} (was {_short(changed[key][0])}, now {_short(changed[key][1])})"
            for key in others[:4]
        )
        raise UserError(
            f"the run in {directory.path} was started with other settings: {differences}",
            where=loaded.provenance.get(others[0], others[0]),
            fix="resume with the same settings, or start a new run with another --output_dir"
            + _with_this_adapter(loaded.config, directory),
        )
    if STEPS not in changed:
        return _stopped_early(directory) and not _stops(loaded.config, directory)
    before, now = changed[STEPS]
    where = loaded.provenance.get(STEPS, STEPS)
    if now < before:
        raise UserError(
            f"the run in {directory.path} was started with max_steps = {before}, which cannot be "
            f"lowered to {now}",
            where=where,
            fix="resume with the same or a larger max_steps",
        )
    if rate_depends_on_max_steps(loaded.config):
        kind = loaded.config.trainer.scheduler.type
        raise UserError(
            f'with trainer.scheduler.type = "{kind}" and no decay_steps the learning rate of each '
            f"step depends on max_steps: a run of {now} steps is another one from its start than "
            f"the run of {before} steps in {directory.path}",
            where=where,
            fix="start a new run"
            + _with_this_adapter(loaded.config, directory)
            + '. Runs with type = "constant", or with decay_steps, can be extended',
        )
    return True


def _stopped_early(directory: RunDirectory) -> bool:
    """Whether the run has ended before `max_steps`. What is damaged is said elsewhere."""
    try:
        return bool((directory.read(SCOREBOARD) or {}).get(STOPPED))
    except UserError:
        return False


def _stops(config: Config, directory: RunDirectory) -> bool:
    selection = Selection(config)
    selection.replay(directory.records.all())
    return selection.stopped is not None


def check_nothing_was_saved(config: Config, directory: RunDirectory) -> None:
    """Raise UserError (exit code 3) if a run without checkpoints must have had one.

    It would start again from its first step, and its records would be lost.
    """
    first = config.ckpt.interval or config.max_steps
    last = max((record["step"] for record in directory.records.all()), default=0)
    if last > first or (directory.path / SCOREBOARD).exists():
        raise UserError(
            f"{directory.path / 'checkpoints'} has no checkpoint, but {METRICS} has {last} steps",
            where=str(directory.path / "checkpoints"),
            fix="restore a checkpoint from a copy, or start a new run with another --output_dir"
            + _with_this_adapter(config, directory),
            exit_code=EXIT_ENVIRONMENT,
        )


def _short(value: object) -> str:
    """A setting on one short line: some hold whole texts."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _with_this_adapter(config: Config, directory: RunDirectory) -> str:
    """How a new run begins with what this one has learned."""
    if not config.trainer.model.lora:
        return ""
    return f'; trainer.model.lora.init = "{directory.path}" starts it from this run\'s adapter'
