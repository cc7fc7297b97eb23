"""The command `minidistill chat`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.cli.sources import add_sampling, add_source, sampling, source_fix
from minidistill.errors import UserError
from minidistill.system.threads import before_torch


def add_chat(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="ask a trained model, and its base beside it",
        usage="minidistill chat RUN|ADAPTER|MODEL [--side-by-side] [--with-context] [--ask TEXT] "
        "[--base MODEL] [--context FILE|TEXT] [--temperature T] [--max-tokens N] [--server] "
        "[--traceback]",
        description="""\
Ask what a run has trained, in several turns, with the run's chat template, stop tokens and
sampling settings. With --side-by-side the base, the base that reads the context and the student
answer the same questions. Without a terminal each line of the input is a question, and the
answers go to the output. A run that has not finished answers with its latest checkpoint.""",
        epilog="""\
examples:
  minidistill chat runs/mine --side-by-side
  minidistill chat exported/mine --context persona.txt --ask "Who are you?"
  minidistill chat runs/mine --server""",
    )
    parser.set_defaults(handler=_chat)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RUN|ADAPTER|MODEL",
        help="a run's directory, a PEFT folder, or a model's folder or name",
    )
    parser.add_argument(
        "--side-by-side", action="store_true", help="the base, the base in context and the student"
    )
    parser.add_argument(
        "--with-context", action="store_true", help="the student reads the context too"
    )
    parser.add_argument("--ask", metavar="TEXT", help="ask this alone")
    add_source(parser)
    add_sampling(parser)
    parser.add_argument(
        "--server",
        action="store_true",
        help="print the command that serves it with vLLM, and ask nothing",
    )


def _chat(options: argparse.Namespace, rest: list[str]) -> int:
    if options.name is None or rest:
        what = f"chat does not know {rest[0]}" if rest else "chat takes a run or an adapter"
        raise UserError(what, fix=source_fix("chat"))
    temperature, max_tokens = sampling(options)

    before_torch()
    from minidistill.look.chat_command import Options, chat

    return chat(
        options.name,
        Options(
            base=options.base,
            context=options.context,
            with_context=options.with_context,
            side_by_side=options.side_by_side,
            question=options.ask,
            server=options.server,
            temperature=temperature,
            max_tokens=max_tokens,
        ),
    )
