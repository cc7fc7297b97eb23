"""Checks of the command lines in documents: what they name exists, and our own can be parsed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from minidistill import cli
from minidistill.config import load_config
from support.configs import MINIMAL
from support.paths import ROOT

_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_WITH_CONFIGURATION = (["run"], ["plan"], ["config"], ["env", "prompts"])
"""Commands of which all that their parser leaves over is a configuration's."""
_OF_THE_SHELL = {"cd", "source", "export", "echo", "cat"}
_OF_OTHERS = {"vllm", "sha256sum", "git"}
"""Programs whose arguments are not checked."""


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command in a block: no comments, assignments or redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        is_redirected = False
        for word in [*words, ";"]:
            if is_redirected:  # a file's name
                is_redirected = False
            elif set(word) <= set("<>"):
                is_redirected = True
            elif set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            elif command or not _ASSIGNMENT.match(word):
                command.append(word)


def check_command(words: list[str], folder: Path) -> None:
    """Raises if a command could not be run. `folder` is for files that stand in for a reader's."""
    program, args = words[0], words[1:]
    if program in _OF_THE_SHELL | _OF_OTHERS:
        return
    name = Path(program).name
    assert name in _CHECKS, f"nothing is known of {program!r}: add it, or write the block as text"
    _CHECKS[name](args, folder)


def _minidistill(args: list[str], folder: Path) -> None:
    parser, _ = cli._parsers()
    _, rest = parser.parse_known_args(args)
    if any(args[: len(command)] == command for command in _WITH_CONFIGURATION):
        # a run's adapter that is started from is not looked for in a resumed run
        resume = "--resume" in args or "--trainer.model.lora.init" in args
        load_config([_stand_in(word, folder) for word in rest], resume=resume)
    elif args[0] == "bake":
        load_config([_stand_in("minimal.toml", folder), *rest])
    elif args[:2] != ["env", "check"] and args[0] not in ("eval", "bench"):
        assert not rest, f"minidistill {args[0]} does not know {rest}"


def _stand_in(word: str, folder: Path) -> str:
    """The smallest configuration in place of a reader's own file, other words as they are."""
    if word.startswith("-") or not word.endswith(".toml") or (ROOT / word).exists():
        return word
    file = folder / Path(word).name
    file.write_text(MINIMAL)
    return str(file)


def _make(args: list[str], _: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in args if not _ASSIGNMENT.match(word)]
    for target in targets:
        pattern = re.escape(re.sub(r"-(oldest|newest|[\d.]+)$", "-%", target))
        assert re.search(rf"^[^#\n]*\b{pattern}( [^\n]*)?:", makefile, re.M), target


def _pip(args: list[str], _: Path) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in args:
        if extras := re.search(r"(?:minidistill|\.)\[([\w,-]+)\]", word):
            assert set(extras[1].split(",")) <= set(known["optional-dependencies"]), word


def _python(args: list[str], folder: Path) -> None:
    if args[0] == "-m" and args[1] == "minidistill":
        _minidistill(args[2:], folder)
    elif args[0] == "-m":
        assert importlib.util.find_spec(args[1]), f"there is no module {args[1]}"
    else:
        assert (ROOT / args[0]).exists(), f"there is no file {args[0]}"


def _torchrun(args: list[str], folder: Path) -> None:
    _python(args[args.index("-m") :], folder)


_CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "minidistill": _minidistill,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
}
