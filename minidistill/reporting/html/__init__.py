"""A run directory as one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import os
from pathlib import Path

from minidistill.errors import printable
from minidistill.reporting.formatting import HEAT, clean, level, number
from minidistill.reporting.html.curves import charts
from minidistill.reporting.html.read import read_run
from minidistill.reporting.terminal.rows import effort, env_rows, gap, scoreboard_rows, share

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    The run may still be going, or have stopped anywhere: what is missing or damaged is left out
    and said. Raises UserError (exit code 2) where `run_dir` holds no run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    run = read_run(Path(run_dir))
    # Everything that comes from a model or a file is escaped: the template marks nothing as safe.
    environment = Environment(
        loader=PackageLoader("minidistill.reporting.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "clean": clean, "printable": _text}
    names = [f"below {number(limit)}" for limit in HEAT] + [f"{number(HEAT[-1])} and more"]
    html = environment.get_template("report.html").render(
        run=run,
        charts=charts(run.steps),
        board_rows=scoreboard_rows(run.board)[1:] if run.board else [],
        gap=gap(run.board),
        share=share(run.board),
        effort=effort(run.board),
        env_rows=env_rows(run.board),
        heat=names,
        level=level,
    )
    path = Path(run_dir) / "report.html"
    aside = path.with_suffix(f".html.{os.getpid()}.tmp")
    # A reader of the page never meets half of it.
    aside.write_text(html, encoding="utf-8")
    os.replace(aside, path)
    return path


def _text(value: object) -> str:
    """Text of several lines without control characters; line breaks stay."""
    return printable(str(value)).encode("utf-8", "replace").decode("utf-8")
