"""A run's report: one self-contained HTML page, without network access or scripts."""

from __future__ import annotations

import logging
from pathlib import Path

from minidistill.errors import printable
from minidistill.reporting.formatting import KL_LEVELS, clean, kl_level, number
from minidistill.reporting.html.curves import charts
from minidistill.reporting.html.read import read_run
from minidistill.reporting.html.summary import summary_html
from minidistill.reporting.scoreboard_rows import (
    bar,
    effort,
    env_rows,
    scoreboard_rows,
    side_by_side,
    verdict,
)
from minidistill.system.files import write_atomic

__all__ = ["summary_html", "write_report"]

logger = logging.getLogger(__name__)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's directory and return its path.

    The run may be in progress or have stopped at any point: the page leaves out files that are
    missing or damaged and says so; a warning names damaged ones. Raises UserError (exit code 2) if
    `run_dir` holds no run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    run = read_run(Path(run_dir))
    # All text from models and files is escaped: the template marks nothing as safe.
    environment = Environment(
        loader=PackageLoader("minidistill.reporting.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "clean": clean, "printable": _text}
    levels = [f"below {number(limit)}" for limit in KL_LEVELS]
    levels.append(f"{number(KL_LEVELS[-1])} and more")
    html = environment.get_template("report.html").render(
        run=run,
        charts=charts(run.steps),
        verdict=verdict(run.board),
        bar=bar(run.board),
        board_rows=scoreboard_rows(run.board),
        effort=effort(run.board),
        env_rows=env_rows(run.board),
        side_by_side=side_by_side(run.board),
        kl_levels=levels,
        kl_level=kl_level,
    )
    path = Path(run_dir) / "report.html"
    write_atomic(path, html)
    for damage in run.damage:
        logger.warning(f"{run_dir}: {damage}")
    return path


def _text(value: object) -> str:
    """Text without control characters; line breaks stay."""
    return printable(str(value)).encode("utf-8", "replace").decode("utf-8")
