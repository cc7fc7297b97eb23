"""The command `minidistill export`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.errors import UserError
from minidistill.system.threads import before_torch

_EXAMPLE = "minidistill export runs/mine --to exported/mine"


def add_export(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "export",
        help="write a run's adapter or model for other programs, checked",
        usage="minidistill export RUN --to DIR [--merge] [--base NAME] [--with-context] [--gguf] "
        "[--push REPO] [--no-vllm] [--traceback]",
        description="""\
Write what a run has trained to a folder that other programs load: the adapter, or with --merge
the whole model in its checkpoint's dtype, with the tokenizer, the chat template and a model
card. Before the folder is there, it is loaded in transformers (with peft) and in vLLM if that
is installed, and their log-probs are compared with those of the run's weights (exit code 4 if
they differ). A run that is not finished exports its latest checkpoint's adapter.""",
        epilog=f"""\
examples:
  {_EXAMPLE}
  minidistill export runs/mine --to exported/merged --merge
  minidistill export runs/mine --to exported/mine --base Qwen/Qwen3-4B-Instruct-2507""",
    )
    parser.set_defaults(handler=_export)
    parser.add_argument("run", nargs="?", metavar="RUN", help="directory of a run")
    parser.add_argument("--to", metavar="DIR", help="the folder to write, which is not there yet")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights")
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="the base's name in what is written; by default its id on the hub, or its path from "
        "the current directory",
    )
    parser.add_argument(
        "--with-context",
        action="store_true",
        help="quote the context in the model card, which else has its length and hash",
    )
    parser.add_argument(
        "--gguf", action="store_true", help="also a GGUF file, by llama.cpp's converter; merges"
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload it to this repository of the hub, private if new"
    )
    parser.add_argument("--no-vllm", action="store_true", help="do not load it in vLLM")


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    if options.run is None or rest:
        what = f"export does not know {rest[0]}" if rest else "export takes a run's directory"
        raise UserError(what, fix=_EXAMPLE)
    if not options.to:
        raise UserError("export takes the folder to write", "--to", _EXAMPLE)
    if options.base == "":
        raise UserError("the base's name is empty", "--base", "give its id on the hub, or a folder")
    from pathlib import Path

    before_torch()
    from minidistill.export.command import Options, export

    return export(
        Path(options.run),
        Options(
            to=Path(options.to),
            merge=options.merge,
            base=options.base,
            quotes_context=options.with_context,
            gguf=options.gguf,
            push=options.push,
            vllm=not options.no_vllm,
        ),
    )
