"""The command `minidistill doctor`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.errors import UserError


def add_doctor(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="check that this machine can run, and say what to fix",
        usage="minidistill doctor [--quick] [--json] [--traceback]",
        description="""\
Check Python, the packages, torch's and vLLM's builds, the driver, GPUs, memory, disk, Triton and
handles between processes, and train a step on each engine that is installed. Each check has a
process of its own. Exit code 3 if one fails.""",
        epilog="examples:\n  minidistill doctor\n  minidistill doctor --quick --json",
    )
    parser.set_defaults(handler=_doctor)
    parser.add_argument("--quick", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"doctor does not know {rest[0]}", fix="minidistill doctor")
    from minidistill.doctor.command import diagnose

    return diagnose(quick=options.quick, as_data=options.json)
