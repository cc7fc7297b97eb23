"""The command `minidistill bake`."""

from __future__ import annotations

import argparse
import difflib

from minidistill.cli.parser import Commands, announce_torch
from minidistill.errors import UserError
from minidistill.system.threads import before_torch

_EXAMPLE = 'minidistill bake --model Qwen/Qwen3-4B-Instruct-2507 --context "You are an old pirate."'
_FLAGS = ("model", "context", "prompts", "steps", "out", "resume")


def add_bake(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bake",
        help="bake a context into an adapter of a model, in one line",
        usage="minidistill bake --model M --context FILE|TEXT [--prompts FILE] [--steps N] "
        "[--out DIR] [--resume] [--key VALUE]… [--traceback]",
        description="""\
Train a model to behave as if it had read the context, by the teacher's signal alone. Everything
else has a default for this machine. The run's config.toml has what was chosen: edit it, and run it
again with `minidistill run`.""",
        epilog=f"""\
examples:
  {_EXAMPLE}
  minidistill bake --model ./my-model --context persona.txt --prompts questions.txt --steps 60
  minidistill bake --model my-model --context rules.md --out runs/rules --trainer.optim.lr 5e-4""",
    )
    parser.set_defaults(handler=_bake)
    parser.takes_settings = True
    parser.add_argument("--model", metavar="M", help="a hub id, a folder, or a built-in model")
    parser.add_argument(
        "--context", metavar="FILE|TEXT", help="what the model should not have to read any more"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts to train on: .txt (one a line), .jsonl, .json, .csv, .tsv or .parquet; by "
        "default the model writes them itself",
    )
    parser.add_argument("--steps", metavar="N", help="optimizer steps (max_steps)")
    parser.add_argument(
        "--out", metavar="DIR", help="the run's directory; by default a new one under runs/"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run directory's latest checkpoint"
    )
    parser.add_argument_group(
        "settings",
        "--key VALUE    any other setting by its dotted name, as for `minidistill run`",
    )


def _bake(options: argparse.Namespace, rest: list[str]) -> int:
    missing = [flag for flag in ("model", "context") if getattr(options, flag) is None]
    if missing:
        named = " and ".join(f"--{flag}" for flag in missing)
        raise UserError(f"bake needs {named}", named, _EXAMPLE)
    steps = None if options.steps is None else _steps(options.steps)
    _check_flags(rest)
    _check_files(options.context, options.prompts)

    announce_torch()
    before_torch()
    from minidistill.baking.command import bake

    return bake(
        options.model,
        options.context,
        options.prompts,
        steps,
        options.out,
        rest,
        resume=options.resume,
    )


def _check_flags(rest: list[str]) -> None:
    """Raise UserError for an option that is misspelt: as a setting it would be explained badly."""
    for word in rest:
        name = word.removeprefix("--").partition("=")[0]
        close = difflib.get_close_matches(name, _FLAGS, 1, 0.75) if name != word else []
        if close:
            raise UserError(f"bake has no --{name}", f"--{name}", f"did you mean --{close[0]}?")


def _check_files(context: str, prompts: str | None) -> None:
    """Raise UserError for files that cannot be used, seconds before torch is loaded."""
    from minidistill.baking.context import read_context
    from minidistill.baking.prompts import prompts_args

    if not context.startswith("/dev/"):  # a pipe can be read once
        read_context(context)
    if prompts is not None:
        prompts_args(prompts)


def _steps(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        what = f"--steps {text!r} cannot be used"
        raise UserError(what, "--steps", "give a whole number above 0") from None
