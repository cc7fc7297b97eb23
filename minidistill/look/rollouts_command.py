"""`minidistill rollouts`: what a run has sampled, page by page, as text or as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from minidistill.errors import EXIT_OK
from minidistill.look.rollout_text import rollout_text
from minidistill.look.rollouts import read_rollouts


def show_rollouts(
    run: Path, *, step: int | None, task: str | None, worst: int | None, as_json: bool
) -> int:
    """Show the chosen rollouts. Returns the exit code. Raises UserError."""
    rollouts = read_rollouts(run, step, task, worst)
    if as_json:
        for rollout in rollouts:
            print(json.dumps(rollout.as_data()))
        sys.stdout.flush()
        return EXIT_OK
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(markup=False, emoji=False, highlight=False)
    colored = console.is_terminal and not console.no_color
    count = len(rollouts)

    def page(index: int) -> Text:
        return rollout_text(rollouts[index], f"({index + 1} of {count})", colored=colored)

    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    if sys.stdin.isatty() and sys.stdout.isatty() and not dumb:
        from minidistill.look.pager import page_through

        page_through(count, page, console)
    else:
        for index in range(count):
            console.print(page(index), soft_wrap=True)
    return EXIT_OK
