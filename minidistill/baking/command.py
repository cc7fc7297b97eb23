"""What `minidistill bake` does: the run, and what one wants next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from minidistill.baking.configuration import bake_configuration
from minidistill.baking.flags import naming_flags
from minidistill.driver.loop import run
from minidistill.errors import EXIT_OK, UserError, printable
from minidistill.reporting.terminal import lasting_output
from minidistill.system.files import shown_path
from minidistill.system.foreign import check_interrupted
from minidistill.trainer.distributed.rank_group import launched_by_torchrun


def bake(
    model: str,
    context: str,
    prompts: str | None,
    steps: int | None,
    out: str | None,
    overrides: Sequence[str],
    *,
    resume: bool,
) -> int:
    """Bake a context into a model and print the commands that follow. Returns the exit code.

    The arguments are those of `bake_configuration`. Raises UserError.
    """
    if launched_by_torchrun() is not None:
        raise UserError(
            "bake is for one machine, and torchrun has started it",
            fix="bake with --steps 1, then torchrun … -m minidistill run its config.toml",
        )
    plan = bake_configuration(model, context, prompts, steps, out, overrides, resume=resume)
    check_interrupted()  # while packages were imported
    try:
        with naming_flags():
            code = run(plan.loaded, resume=resume)
    except SystemExit as error:  # of an environment's code: never a success
        raise RuntimeError(f"something called sys.exit({error.code!r})") from error
    if code == EXIT_OK:
        with lasting_output():  # the run is there, whether or not somebody reads this
            print(printable(next_commands(plan.directory)))
            sys.stdout.flush()
    return code


def next_commands(directory: Path) -> str:
    """What one wants after a run: to try it, to see it, and to take it elsewhere."""
    path = shown_path(directory)
    run_, config = shlex.quote(path), shlex.quote(f"{path}/config.toml")
    exported = shlex.quote(f"exported/{directory.name}")
    return f"""\
next:
  minidistill chat {run_} --side-by-side
  minidistill report {run_}
  minidistill export {run_} --to {exported}
to change it, edit the settings that were chosen and run them again:
  minidistill run {config} --output_dir {run_}-2"""
