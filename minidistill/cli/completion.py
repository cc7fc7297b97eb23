"""The command `minidistill completion`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.errors import EXIT_OK, UserError

SHELLS = ("bash", "zsh", "fish")


def add_completion(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and settings in a shell",
        usage="minidistill completion bash|zsh|fish [--traceback]",
        description="""\
Print a script that completes commands, options, settings and files. It is a list of words, made
from this version: after an update it is to be printed again.""",
        epilog="""\
examples:
  minidistill completion bash > ~/.local/share/bash-completion/completions/minidistill
  minidistill completion zsh > ~/.zfunc/_minidistill     # with ~/.zfunc in fpath
  minidistill completion fish > ~/.config/fish/completions/minidistill.fish""",
    )

    def handler(options: argparse.Namespace, rest: list[str]) -> int:
        if options.shell not in SHELLS or rest:
            what = "completion takes one of bash, zsh and fish"
            raise UserError(what, fix="minidistill completion bash")
        from minidistill.completion import script

        print(script(options.shell, commands.choices), end="")
        return EXIT_OK

    parser.set_defaults(handler=handler)
    parser.words = SHELLS
    parser.add_argument("shell", nargs="?", metavar="SHELL", help="bash, zsh or fish")
