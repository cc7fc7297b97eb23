"""The command `minidistill eval`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.cli.sources import add_sampling, add_source, sampling, source_fix, whole_number
from minidistill.errors import UserError
from minidistill.system.threads import before_torch


def add_eval(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "eval",
        help="score runs, adapters or models on held-out tasks",
        usage="minidistill eval RUN|ADAPTER|MODEL… [--env ID|FILE.toml] [--args TABLE] [--n N] "
        "[--with-context] [--base MODEL] [--context FILE|TEXT] [--temperature T] [--max-tokens N] "
        "[--json] [--out FILE] [--traceback]",
        description="""\
Score what runs have trained on held-out tasks, with 95% intervals: those of the first run, or
of any environment. Several are compared on the same tasks with the same seeds. Where a context
is known, the KL to the base that reads it is measured too. Nothing is written to a run.""",
        epilog="""\
examples:
  minidistill eval runs/mine --with-context
  minidistill eval runs/mine runs/mine-2 --n 512
  minidistill eval exported/mine --env jsonl --args '{ path = "held-out.jsonl", reward = "exact" }'
  minidistill eval Qwen/Qwen3-0.6B --env sokoban-env""",
    )
    parser.set_defaults(handler=_eval)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="RUN|ADAPTER|MODEL",
        help="a run's directory, a PEFT folder, "
        "or a model's folder or name; differences are from the first",
    )
    parser.add_argument(
        "--env",
        metavar="ID|FILE.toml",
        help="an environment's id, or a file that configures some; by default the first run's",
    )
    parser.add_argument("--args", metavar="TABLE", help="the environment's args, as TOML or JSON")
    parser.add_argument("--n", metavar="N", help="held-out tasks of each environment")
    parser.add_argument(
        "--with-context",
        action="store_true",
        help="also the base, the base in context and the student in context",
    )
    add_source(parser)
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with each task's score")
    parser.add_argument("--out", metavar="FILE", help="write the JSON to a file too")


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    if not options.names or rest:
        what = f"eval does not know {rest[0]}" if rest else "eval takes runs, adapters or models"
        raise UserError(what, fix=source_fix("eval"))
    temperature, max_tokens = sampling(options)
    tasks = whole_number(options.n, "--n")

    before_torch()
    from minidistill.look.eval_command import Options, run_evaluation
    from minidistill.look.eval_settings import Asked

    return run_evaluation(
        options.names,
        Options(
            asked=Asked(options.env, options.args, tasks, temperature, max_tokens),
            base=options.base,
            context=options.context,
            with_context=options.with_context,
            as_json=options.json,
            out=options.out,
        ),
    )
