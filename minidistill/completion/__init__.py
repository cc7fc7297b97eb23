"""Scripts that complete the command line in a shell: lists of words, which start no Python."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping

from minidistill.completion import bash, fish, zsh
from minidistill.completion.words import read_commands, read_settings

WRITERS = {"bash": bash.script, "zsh": zsh.script, "fish": fish.script}


def script(shell: str, parsers: Mapping[str, ArgumentParser]) -> str:
    """The script for a shell. `parsers` are those of the commands, by name."""
    return WRITERS[shell](read_commands(parsers), read_settings())
