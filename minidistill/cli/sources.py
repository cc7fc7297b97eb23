"""The options of commands that load what a run has trained."""

from __future__ import annotations

import argparse
import math

from minidistill.cli.parser import CommandParser
from minidistill.errors import UserError


def source_fix(command: str) -> str:
    return f"minidistill {command} runs/mine, or see minidistill {command} --help"


def add_source(parser: CommandParser) -> None:
    """Options that say what no run says."""
    parser.add_argument(
        "--base", metavar="MODEL", help="the model before training, of an adapter or a model"
    )
    parser.add_argument(
        "--context",
        metavar="FILE|TEXT",
        help="the context, where no run says it, or another than the run's",
    )


def add_sampling(parser: CommandParser) -> None:
    """Options that take the place of the run's sampling settings."""
    parser.add_argument(
        "--temperature", metavar="T", help="0 is greedy; by default that of the run"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", help="the longest answer; by default that of the run"
    )


def sampling(options: argparse.Namespace) -> tuple[float | None, int | None]:
    """The temperature and the tokens that are asked for. Raises UserError."""
    temperature = None
    if options.temperature is not None:
        try:
            temperature = float(options.temperature)
        except ValueError:
            temperature = math.nan
        if not 0 <= temperature < math.inf:
            what = f"--temperature {options.temperature!r} cannot be used"
            raise UserError(what, "--temperature", "give a number that is not negative")
    return temperature, whole_number(options.max_tokens, "--max-tokens")


def whole_number(text: str | None, flag: str) -> int | None:
    """The number above 0 that a flag has, None without it. Raises UserError."""
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{flag} {text!r} cannot be used", flag, "give a whole number above 0")
    return number
