"""The commands `minidistill env …`: check an environment, write the prompts of `self-prompts`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.system.threads import before_torch

_EXAMPLE = "minidistill env check sokoban-env"


def add_env(commands: Commands) -> None:
    """Declare the commands."""
    parser = commands.add_parser(
        "env",
        help="check an environment, or write the prompts of self-prompts",
        usage="minidistill env check|prompts …",
        description="Check an environment, or write the prompts of a run, before it starts.",
        epilog=f"""\
examples:
  {_EXAMPLE}
  minidistill env check capitals:Capitals --args '{{ held_out = ["Peru"] }}'
  minidistill env prompts my.toml""",
    )
    parser.set_defaults(handler=lambda options, rest: _no_command(parser))
    actions = parser.add_subparsers(title="commands", prog="minidistill env", metavar="COMMAND")
    _add_check(actions)
    _add_prompts(actions)


def _no_command(parser: argparse.ArgumentParser) -> int:
    import sys

    parser.print_help(sys.stderr)
    return EXIT_USAGE


def _add_check(actions: Commands) -> None:
    parser = actions.add_parser(
        "check",
        help="check an environment against its contract",
        usage="minidistill env check ID [FILES…] [--args TABLE] [--args.KEY VALUE] [--key VALUE]… "
        "[--samples N] [--with-model] [--json] [--traceback]",
        description="""\
Load an environment and check what a run relies on: that it gives the same tasks each time,
that nothing is in both splits, that rewards are finite and tell right from wrong, how long a
score takes, and that both views of its prompts fit and differ by the context. Conversations
are played with scripted answers. Exit code 1 if a check fails. Without FILES the template is
that of the built-in model; instead of an ID, a TOML file checks all environments that it
configures.""",
        epilog=f"""\
examples:
  {_EXAMPLE} --args.rules omit
  minidistill env check jsonl my.toml --args '{{ path = "prompts.jsonl" }}' --json
  minidistill env check sokoban""",
    )
    parser.set_defaults(handler=_check)
    parser.add_configuration()
    parser.add_argument(
        "--samples",
        metavar="N",
        default="8",
        help="tasks of each split whose answers are scored; 8 by default",
    )
    parser.add_argument(
        "--with-model", action="store_true", help="have the model play conversations too"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        samples = int(options.samples)
    except ValueError:
        samples = 0
    if samples < 1:
        what = f"--samples {options.samples!r} cannot be used"
        raise UserError(what, "--samples", "give a whole number above 0")
    if not rest or rest[0].startswith("--"):
        raise UserError("env check takes an environment's id, or a TOML file", fix=_EXAMPLE)

    before_torch()
    from minidistill.driver.env_command import check_environments

    return check_environments(rest, samples, with_model=options.with_model, as_data=options.json)


def _add_prompts(actions: Commands) -> None:
    parser = actions.add_parser(
        "prompts",
        help="sample the prompts of self-prompts, and print their files",
        usage="minidistill env prompts FILES… [--key VALUE]… [--traceback]",
        description="""\
Have the model write the prompts of each `self-prompts` in the configuration, as `run` would,
and print the path of each file. Files that are there already are not written again.""",
        epilog="examples:\n  minidistill env prompts self-prompts",
    )
    parser.set_defaults(handler=_prompts)
    parser.add_configuration()


def _prompts(options: argparse.Namespace, rest: list[str]) -> int:
    if not rest:
        fix = "minidistill env prompts self-prompts"
        raise UserError("no configuration is given", fix=fix)

    before_torch()
    from minidistill.driver.env_command import write_prompts

    return write_prompts(rest)
