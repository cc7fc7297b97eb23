"""`minidistill doctor`: makes the checks one after another, and says what each found."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TextIO, cast

from rich.console import Console
from rich.text import Text

from minidistill import __version__
from minidistill.doctor.catalog import CHECKS, Check
from minidistill.doctor.isolated import make
from minidistill.doctor.result import Result
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK
from minidistill.reporting.terminal.output import Output

STYLES = {"pass": "green", "fail": "bold red", "skipped": "dim"}
STATUS, NAME = 9, 15  # cells, with the gap after them
INDENT = STATUS + NAME
LONGEST = 10_000  # characters of a line in a pipe


def diagnose(*, quick: bool, as_data: bool) -> int:
    """Make the checks, without those that train if `quick`. Returns 0, or 3 if one fails."""
    made = _made(check for check in CHECKS if not (quick and check.runs))
    results = list(made) if as_data else list(_shown(made))
    counts: Counter[str] = Counter(result.status for _, result, _ in results)
    if as_data:
        _print_data(results, counts)
    else:
        parts = [f"{counts[status]} {status}" for status in STYLES if counts[status]]
        print(", ".join(parts))
    return EXIT_ENVIRONMENT if counts["fail"] else EXIT_OK


Made = tuple[Check, Result, float]
"""A check, what it found, and the seconds it took."""


def _made(checks: Iterable[Check]) -> Iterator[Made]:
    for check in checks:
        began = time.monotonic()
        yield check, make(check), time.monotonic() - began


def _shown(made: Iterable[Made]) -> Iterator[Made]:
    """Print each result as soon as it is there. A pipe gets whole lines."""
    console = Console(
        file=cast(TextIO, Output(sys.stdout)), markup=False, emoji=False, highlight=False
    )
    width = console.width - INDENT if console.is_terminal else LONGEST
    for each in made:
        check, result, _ = each
        lines = textwrap.wrap(result.text, max(20, width)) or [""]
        if result.fix:
            lines += textwrap.wrap(f"fix: {result.fix}", max(20, width))
        start = Text.assemble(
            (result.status.ljust(STATUS), STYLES[result.status]), check.name.ljust(NAME)
        )
        text = Text(f"\n{' ' * INDENT}").join(map(Text, lines))
        console.print(start + text, soft_wrap=True)
        yield each


def _print_data(results: list[Made], counts: Counter[str]) -> None:
    rows = [
        {"name": check.name, **asdict(result), "seconds": round(seconds, 2)}
        for check, result, seconds in results
    ]
    passed = not counts["fail"]
    print(json.dumps({"minidistill": __version__, "passed": passed, "checks": rows}, indent=2))
