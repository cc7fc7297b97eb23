"""The command `minidistill init`."""

from __future__ import annotations

import argparse
import sys

from minidistill.cli.parser import Commands
from minidistill.errors import UserError
from minidistill.system.threads import before_torch

_EXAMPLE = 'minidistill init my.toml --model Qwen/Qwen3-4B-Instruct-2507 --context "Be brief."'
_FILE = "minidistill.toml"


def add_init(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "init",
        help="write a configuration to start from",
        usage="minidistill init [FILE] [--model M] [--context FILE|TEXT] [--prompts FILE] "
        "[--env ID] [--yes] [--force] [--traceback]",
        description=f"""\
Write a TOML file with comments, to edit and to run: {_FILE} by default. On a
terminal it asks for what no flag says. The model is not loaded, and need not be there yet.""",
        epilog=f"examples:\n  minidistill init\n  {_EXAMPLE}\n"
        "  minidistill init game.toml --context expert.txt --env sokoban-env",
    )
    parser.set_defaults(handler=_init)
    parser.add_argument("file", nargs="?", metavar="FILE", default=_FILE, help="the file to write")
    parser.add_argument("--model", metavar="M", help="a hub id, a folder, or a built-in model")
    parser.add_argument(
        "--context", metavar="FILE|TEXT", help="what the model should not have to read any more"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts to train on, as for `minidistill bake`"
    )
    parser.add_argument(
        "--env", metavar="ID", help="an environment with a reward, in place of prompts"
    )
    parser.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def _init(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        fix = f"add other settings to the file; {_EXAMPLE}"
        raise UserError(f"init does not know {rest[0]}", fix=fix)

    before_torch()
    from minidistill.baking.init import init

    return init(
        options.file,
        options.model,
        options.context,
        options.prompts,
        options.env,
        asks=not options.yes and sys.stdin.isatty() and sys.stdout.isatty(),
        force=options.force,
    )
