"""The command `minidistill report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidistill.cli.parser import Commands
from minidistill.errors import EXIT_OK, UserError, printable

_EXAMPLE = "minidistill report runs/NAME"


def add_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's HTML report again, or compare several runs",
        usage="minidistill report RUN [RUN …] [--out FILE] [--traceback]",
        description="""\
Write the HTML report of a run, finished or not, and print its path. Of several runs, write one
page that compares their results, the settings that differ, their curves and their answers.""",
        epilog="""\
examples:
  minidistill report runs/sokoban
  minidistill report runs/sokoban runs/sokoban-2 --out comparison.html""",
    )
    parser.set_defaults(handler=_report)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page to write; by default report.html in the run's directory, or comparison.html "
        "in the current one",
    )


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"report does not know {rest[0]}", fix=_EXAMPLE)
    if not options.runs:
        raise UserError("report takes a run's directory", fix=_EXAMPLE)
    runs = [Path(run) for run in options.runs]
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is not a directory", fix="give the directory of a run")
    from minidistill.reporting.html import write_comparison, write_report

    out = None if options.out is None else Path(options.out)
    if len(runs) == 1:
        written = write_report(runs[0]) if out is None else write_report(runs[0], out)
    else:
        written = write_comparison(runs) if out is None else write_comparison(runs, out)
    print(printable(str(written)))
    return EXIT_OK
