"""The command `minidistill report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidistill.cli.parser import Commands
from minidistill.errors import EXIT_OK, UserError, printable


def add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's HTML report again",
        usage="minidistill report DIR [--traceback]",
        description="Write the HTML report of the run in DIR again and print its path.",
        epilog="example:\n  minidistill report runs/sokoban",
    )
    parser.set_defaults(handler=_report)
    parser.add_argument("directory", nargs="?", metavar="DIR", help="directory of a run")


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    if options.directory is None or rest:
        raise UserError("report takes one run directory", fix="minidistill report runs/NAME")

    directory = Path(options.directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory", fix="give the directory of a run")
    from minidistill.reporting.html import write_report

    print(printable(str(write_report(directory))))
    return EXIT_OK
