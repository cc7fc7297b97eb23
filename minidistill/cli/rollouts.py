"""The command `minidistill rollouts`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands
from minidistill.cli.sources import whole_number
from minidistill.errors import UserError

_EXAMPLE = "minidistill rollouts runs/mine"


def add_rollouts(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "rollouts",
        help="read what a run has sampled, colored by the teacher",
        usage="minidistill rollouts RUN [--step N] [--worst K] [--task ID] [--json] [--traceback]",
        description="""\
Show recorded rollouts: both prompts, the completion with each token colored by its KL to the
teacher, and the reward. Of the last step by default, of all steps with --worst or --task.
On a terminal n and p go to the next and the previous one, arrows scroll and q quits.""",
        epilog=f"""\
examples:
  {_EXAMPLE}
  {_EXAMPLE} --worst 10
  {_EXAMPLE} --task train/17 --json""",
    )
    parser.set_defaults(handler=_rollouts)
    parser.add_argument("run", nargs="?", metavar="RUN", help="directory of a run")
    parser.add_argument("--step", metavar="N", help="those of this step")
    parser.add_argument(
        "--worst", metavar="K", help="the K with the highest mean KL to the teacher"
    )
    parser.add_argument("--task", metavar="ID", help="those of this task")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def _rollouts(options: argparse.Namespace, rest: list[str]) -> int:
    if options.run is None or rest:
        what = f"rollouts does not know {rest[0]}" if rest else "rollouts takes a run's directory"
        raise UserError(what, fix=_EXAMPLE)
    step, worst = whole_number(options.step, "--step"), whole_number(options.worst, "--worst")
    from pathlib import Path

    from minidistill.look.rollouts_command import show_rollouts

    return show_rollouts(
        Path(options.run).expanduser(),
        step=step,
        task=options.task,
        worst=worst,
        as_json=options.json,
    )
