"""What the commands share: their parser, the configuration they load, what comes before torch."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from minidistill.error_output import print_to_stderr
from minidistill.errors import UserError

if TYPE_CHECKING:
    from minidistill.config import LoadedConfig

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
"""What makes the commands' parsers, as `add_subparsers` returns it."""
Handler: TypeAlias = Callable[[argparse.Namespace, list[str]], int]
"""A command: takes its options and all other arguments in their order, returns the exit code."""

_CONFIGURATION = """\
FILES…         TOML files, or names of the package's own (sokoban); a later one beats an earlier one
--key VALUE    any setting by its dotted name, in snake or kebab case; beats the files
`minidistill config FILES…` shows all settings, docs/configuration.md explains them."""

_WIDEST = 100
"""Columns of a sentence, on a wide terminal too."""
_ROW = re.compile(r"\S+( \S+)*  +")
"""The first column of a row."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps sentences, rows and the usage at the terminal's width, and keeps indented examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 14  # argparse forgets that commands are indented

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        width = min(width, _WIDEST)
        blocks: list[str] = []
        for line in text.splitlines():
            if line.startswith(" "):
                blocks.append(indent + line)
            elif row := _ROW.match(line):
                hang = indent + " " * row.end()
                blocks.append(_wrap(line, width, indent, hang))
            elif blocks and blocks[-1] and not blocks[-1].startswith(" ") and not indent:
                blocks[-1] = _wrap(f"{blocks[-1]} {line}", width, "", "")
            else:
                blocks.append(_wrap(line, width, indent, indent))
        return "\n".join(blocks)

    def _format_usage(self, usage: str | None, *rest: Any) -> str:
        text = super()._format_usage(usage, *rest)
        if usage is None or (width := min(self._width, _WIDEST)) >= len(text.strip()):
            return text
        # an option and its value stay together
        glued = re.sub(r"\[[^]]*\]", lambda option: option[0].replace(" ", "\0"), text.strip())
        return _wrap(glued, width, "", " " * 7).replace("\0", " ") + "\n\n"


def _wrap(text: str, width: int, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


class CommandParser(argparse.ArgumentParser):
    """Raises UserError where argparse would print and exit."""

    takes_settings = False
    """Whether settings are among its arguments, for completion in a shell."""
    words: tuple[str, ...] = ()
    """What its argument may be, for completion; empty: a path."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=_Formatter,
            **settings,
        )
        self.add_argument("--traceback", action="store_true", help="show where an error was raised")

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see {self.prog} --help")

    def add_configuration(self) -> None:
        """Document files and overrides, which `load_config` reads.

        They are not declared: argparse cannot tell the value of an undeclared option from a file.
        What it does not know it leaves in its order.
        """
        self.takes_settings = True
        self.add_argument_group("configuration", _CONFIGURATION)


def load_configuration(command: str, args: list[str], *, resume: bool = False) -> LoadedConfig:
    """The configuration that a command's files and overrides give. Raises UserError."""
    if not args:
        fix = f"minidistill {command} sokoban"
        raise UserError("no configuration file is given", fix=fix)
    from minidistill.config import load_config

    return load_config(args, resume=resume)


def announce_torch() -> None:
    """The first thing to see on a terminal, seconds before the next: call it first."""
    if sys.stderr.isatty():
        print_to_stderr("loading torch and transformers")
