"""What the commands share: their parser, the configuration they load, what comes before torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

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


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the texts of examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 14  # argparse forgets that commands are indented


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


def before_torch() -> None:
    """What a command that loads torch does first."""
    from minidistill.system.threads import settle_threads

    settle_threads()  # before torch loads OpenMP
    # interpreted kernels have to be asked for before transformers imports triton
    import minidistill_kernels  # noqa: F401
