"""The command `minidistill plan`."""

from __future__ import annotations

import argparse
import math

from minidistill.cli.parser import Commands, load_configuration
from minidistill.errors import UserError


def add_plan(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show what would run on which GPU, and whether it fits",
        usage="minidistill plan FILES… [--gpus N] [--gpu-memory GiB] [--json] [--key VALUE]… "
        "[--traceback]",
        description="""\
Show what `run` would do on a machine: which GPUs sample, score and train, and the memory
of each. If it does not fit (exit code 3), show which settings to change. No weights are loaded.""",
        epilog="""\
examples:
  minidistill plan sokoban-qwen3-4b --gpus 4 --gpu-memory 80
  minidistill plan sokoban-qwen3-4b --gpus 1 --gpu-memory 24 --json""",
    )
    parser.set_defaults(handler=_plan)
    parser.add_configuration()
    parser.add_argument(
        "--gpus",
        type=_gpu_count,
        metavar="N",
        help="GPUs of the machine, 0 for a CPU; by default those of this one",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_gib,
        metavar="GiB",
        help="memory of each GPU, or of the machine for a CPU; by default this machine's, "
        "or 80 if it has no GPU",
    )
    parser.add_argument(
        "--gpu_memory", type=_gib, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = load_configuration("plan", rest)
    from minidistill.placement.command import run_plan

    return run_plan(loaded, gpus=options.gpus, gpu_memory=options.gpu_memory, as_data=options.json)


def _gpu_count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise UserError(
            f"--gpus {text!r} cannot be used",
            where="--gpus",
            fix="give a whole number of GPUs, 0 for a CPU",
        )
    return count


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not math.isfinite(size) or size <= 0:
        raise UserError(
            f"--gpu-memory {text!r} cannot be used", where="--gpu-memory", fix="give GiB above 0"
        )
    return size
