"""The command `minidistill bench`."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from minidistill.cli.parser import Commands
from minidistill.errors import UserError
from minidistill.system.local_modules import find_in_current_directory

_BENCHMARKS = (
    *("step", "peers", "growth", "kernels", "sync", "engines", "schedule", "serving", "sokoban"),
)


def add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure kernels, sync, engines, schedule, serving, sokoban",
        usage="minidistill bench NAME [options]",
        description="""\
Measure on this machine. The same as `python -m bench.NAME` in a checkout, whose --help has the
options.""",
        epilog="""\
examples:
  minidistill bench kernels
  minidistill bench engines --model smollm2""",
    )
    parser.set_defaults(handler=_bench)
    parser.words = _BENCHMARKS
    parser.add_argument(
        "benchmark",
        nargs="?",
        metavar="NAME",
        help="kernels (and other implementations of them), sync (weights in memory and through a "
        "file), engines (vLLM and embedded), schedule (async and sync), serving (an adapter and "
        "the context that it replaces) or sokoban (making levels)",
    )


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    if options.benchmark not in _BENCHMARKS:
        names = ", ".join(_BENCHMARKS)
        raise UserError(f"bench takes one of {names}", fix="minidistill bench kernels")

    # benchmarks are part of a checkout, not of the package
    find_in_current_directory("bench")
    module = f"bench.{options.benchmark}"
    try:
        benchmark = import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("bench", module):
            raise
        raise UserError(
            "there are no benchmarks in this directory",
            where=os.getcwd(),
            fix="run this in a checkout of the project",
        ) from None
    return int(benchmark.main(rest))
