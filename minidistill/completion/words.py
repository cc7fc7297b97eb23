"""What can be completed: the commands' options, and the settings of the configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minidistill.config import schema_tree as tree

Kind = Literal["flag", "free", "files", "folders"]
"""What follows an option: nothing, a text that cannot be guessed, or a path."""

ABOUT = 72
"""Characters of a description."""
FILES, FOLDERS = ("FILE", "FILE|TEXT"), ("DIR",)
"""Metavars by what they stand for."""


@dataclass(frozen=True, slots=True)
class Option:
    """`--name`, and what follows it. `values` are fixed words that it takes."""

    name: str
    about: str
    kind: Kind
    values: tuple[str, ...] = ()

    @property
    def takes_value(self) -> bool:
        """Whether a word has to follow."""
        return self.kind != "flag"


@dataclass(frozen=True, slots=True)
class Command:
    """A command by its words, such as `env check`."""

    path: tuple[str, ...]
    about: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    """What its first argument may be; empty: a path."""
    takes_settings: bool


def read_commands(parsers: Mapping[str, argparse.ArgumentParser]) -> list[Command]:
    """The commands, and those below them. argparse has no public way to read a parser."""
    return [
        command
        for name, parser in parsers.items()
        for command in _read(parser, (name,), parser.description or "")
    ]


def _read(parser: argparse.ArgumentParser, path: tuple[str, ...], about: str) -> Iterator[Command]:
    options: list[Option] = []
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below |= action.choices
        elif action.help != argparse.SUPPRESS:
            names = [name for name in action.option_strings if name.startswith("--")]
            options += [_option(name, action) for name in names]
    words = (*below, *getattr(parser, "words", ()))
    settings = bool(getattr(parser, "takes_settings", False))
    yield Command(path, first_sentence(about), tuple(options), words, settings)
    for name, inner in below.items():
        yield from _read(inner, (*path, name), inner.description or "")


def _option(name: str, action: argparse.Action) -> Option:
    kind: Kind = "free"
    if action.nargs == 0:
        kind = "flag"
    elif action.metavar in FILES:
        kind = "files"
    elif action.metavar in FOLDERS:
        kind = "folders"
    values = tuple(map(str, action.choices or ()))
    return Option(name, first_sentence(action.help or ""), kind, values)


def read_settings() -> list[Option]:
    """Every setting as `--a.b.c`, and `--no-a.b.c` for those that can be switched off.

    A list of tables has its first entry, as in `--orchestrator.env.0.id`.
    """
    options = []
    for path, node in tree.walk():
        name = ".".join("0" if part == "*" else str(part) for part in path)
        kinds, about = tree.kinds(node), first_sentence(node.get("description", ""))
        is_table = bool(tree.properties(node))
        can_be_off = "boolean" in kinds or "null" in kinds
        if is_table and not can_be_off and not tree.choices(node):
            continue  # it is there anyway, and its keys have lines of their own
        values = tuple(tree.choices(node))
        values += ("true", "false") if "boolean" in kinds else ()
        options.append(Option(f"--{name}", about, _kind(node, is_table), values))
        if can_be_off:
            options.append(Option(f"--no-{name}", f"without: {about}", "flag"))
    return options


def _kind(node: tree.Node, is_table: bool) -> Kind:
    kinds = tree.kinds(node)
    if is_table or "boolean" in kinds:
        return "flag"  # a value may follow, and need not
    is_text = node is tree.ANY or "string" in kinds
    return "files" if is_text and not tree.choices(node) else "free"


def first_sentence(text: str) -> str:
    """The beginning of a text on one line, without what shells and their lists read as syntax."""
    line = " ".join(text.split()).replace("`", "").replace("'", "’").replace('"', "")
    line = line.replace("\\", "").replace("$", "").replace("%", "")
    line = line.split(". ")[0].rstrip(".")
    return line if len(line) <= ABOUT else line[: ABOUT - 1].rstrip() + "…"


def cases(
    options: Iterable[Option], action: Callable[[Option], str], path: Sequence[str] = ()
) -> list[str]:
    """Lines of a `case` in bash or zsh: what completes the word after an option, by `action`.
    `path` is the command's, which stands before the option.

    A flag without values has no action, and no line.
    """
    named: dict[str, list[str]] = {}
    for option in options:
        if found := action(option):
            named.setdefault(found, []).append(option.name.replace("-", "_"))
    prefix = "".join(f"{word} " for word in path)
    return [
        "        " + " | ".join(f'"{prefix}{name}"' for name in names) + f") {found} ;;"
        for found, names in named.items()
    ]
