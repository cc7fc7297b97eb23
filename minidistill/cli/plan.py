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
        usage="minidistill plan FILES… [--gpus N] [--gpu-memory GiB] [--gpu-price P] [--json] "
        "[--key VALUE]… [--traceback]",
        description="""\
Show what `run` would do on a machine: which GPUs sample, score and train, and the memory
of each, and the expected time. If it does not fit (exit code 3), show which settings to change.
No weights are loaded.""",
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
    parser.add_argument(
        "--gpu-price",
        type=_price,
        metavar="P",
        help="price of a GPU hour, in any currency: shows what the run's steps cost",
    )
    parser.add_argument(
        "--gpu_price", type=_price, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = load_configuration("plan", rest)
    from minidistill.placement.command import run_plan

    return run_plan(
        loaded,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        gpu_price=options.gpu_price,
        as_data=options.json,
    )


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
    return _above_zero(text, "--gpu-memory", "give GiB above 0")


def _price(text: str) -> float:
    return _above_zero(text, "--gpu-price", "give the price of a GPU hour, above 0")


def _above_zero(text: str, option: str, fix: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not math.isfinite(number) or number <= 0:
        raise UserError(f"{option} {text!r} cannot be used", where=option, fix=fix)
    return number
