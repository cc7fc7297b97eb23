"""The command `minidistill run`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from minidistill.cli.parser import Commands, announce_torch, load_configuration
from minidistill.error_output import as_user_error
from minidistill.errors import EXIT_INTERRUPTED, UserError
from minidistill.system.foreign import check_interrupted, is_interrupt, was_interrupted
from minidistill.system.threads import before_torch

if TYPE_CHECKING:
    from minidistill.reporting.terminal.base import Display

INTERRUPTED = UserError(
    "interrupted", fix="--resume continues from the last checkpoint", exit_code=EXIT_INTERRUPTED
)


def add_run(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="train",
        usage="minidistill run FILES… [--key VALUE]… [--resume] [--quiet | --json] [--traceback]",
        description="Train with the configuration in the files and on the command line.",
        epilog="""\
examples:
  minidistill run sokoban --output-dir runs/first
  minidistill run @ base.toml @ more.toml --inference_gpu_ids 0,1 --trainer_gpu_ids 2 3
  minidistill run sokoban --wandb --no-orchestrator.eval""",
    )
    parser.set_defaults(handler=_run)
    parser.add_configuration()
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run directory's latest checkpoint"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--quiet", action="store_true", help="print the directory, warnings and the scoreboard only"
    )
    shown.add_argument(
        "--json", action="store_true", help="print events, one JSON object a line, and nothing else"
    )


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.quiet:
        from minidistill.reporting.terminal import open_display

        return _train(options, rest, open_display(quiet=True))
    if not options.json:
        return _train(options, rest, None)
    from minidistill.reporting.terminal.json_events import JsonDisplay, events_alone

    with events_alone() as stream:
        display = JsonDisplay(stream)
        try:
            return _train(options, rest, display)
        except BaseException as error:
            if os.environ.get("RANK", "0") == "0":  # of several under torchrun one prints
                interrupted = is_interrupt(error) or was_interrupted()
                display.error(INTERRUPTED if interrupted else as_user_error(error))
            raise


def _train(options: argparse.Namespace, rest: list[str], display: Display | None) -> int:
    loaded = load_configuration("run", rest, resume=options.resume)
    if display is None:
        announce_torch()
    before_torch()
    from minidistill.trainer.distributed.rank_group import launched_by_torchrun

    rank, _ = launched_by_torchrun() or (0, 1)
    if rank > 0:
        from minidistill.trainer.distributed.worker import follow

        return follow(loaded)  # torchrun: rank 0 is the driver, the other ranks only train
    from minidistill.driver.loop import run

    check_interrupted()  # while packages were imported
    try:
        return run(loaded, resume=options.resume, display=display)
    except SystemExit as error:  # of an environment's code: never a success
        raise RuntimeError(f"something called sys.exit({error.code!r})") from error
