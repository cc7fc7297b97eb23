"""The command `minidistill run`."""

from __future__ import annotations

import argparse
import sys

from minidistill.cli.parser import Commands, load_configuration
from minidistill.error_output import print_to_stderr
from minidistill.system.foreign import check_interrupted
from minidistill.system.threads import settle_threads


def add_run(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="train",
        usage="minidistill run FILES… [--key VALUE]… [--resume] [--traceback]",
        description="Train with the configuration in the files and on the command line.",
        epilog="""\
examples:
  minidistill run configs/sokoban.toml --output-dir runs/first
  minidistill run @ base.toml @ more.toml --inference_gpu_ids 0,1 --trainer_gpu_ids 2 3
  minidistill run configs/sokoban.toml --wandb --no-orchestrator.eval""",
    )
    parser.set_defaults(handler=_run)
    parser.add_configuration()
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run directory's latest checkpoint"
    )


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = load_configuration("run", rest, resume=options.resume)
    settle_threads()  # before torch loads OpenMP
    if sys.stderr.isatty():  # the first thing to see, seconds before the next
        print_to_stderr("loading torch and transformers")
    # Interpreted kernels have to be asked for before transformers imports triton.
    import minidistill_kernels  # noqa: F401
    from minidistill.trainer.distributed.rank_group import launched_by_torchrun

    rank, _ = launched_by_torchrun() or (0, 1)
    if rank > 0:
        from minidistill.trainer.distributed.worker import follow

        return follow(loaded)  # torchrun: rank 0 is the driver, the other ranks only train
    from minidistill.driver.loop import run

    check_interrupted()  # while packages were imported
    try:
        return run(loaded, resume=options.resume)
    except SystemExit as error:  # of an environment's code: never a success
        raise RuntimeError(f"something called sys.exit({error.code!r})") from error
