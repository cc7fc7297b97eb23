"""Pages: escaped text, one inline style and script, and no more than 2 MB."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidistill.errors import UserError, bounded, printable
from minidistill.reporting.formatting import KL_LEVELS, clean, kl_level, number
from minidistill.reporting.scoreboard_rows import verdict
from minidistill.system.files import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment

LARGEST = 1_900_000
"""Bytes of a page."""
LONGEST = (20_000, 4_000, 1_000, 200, 40)
"""Characters of a text in the page: the first of these with which it is not too large."""
NAME, LINE = 80, 400
"""Characters of a name, and of a line of text."""
ROWS = 64
"""Rows of a table, and samples, at most: a page whose run has more is still bounded."""
MARK = '<meta name="generator" content="minidistill">'
"""In the first bytes of every page."""
MARK_BYTES = 1_000


def render(template: str, **values: Any) -> str:
    """A page, whose texts are cut so that it is not too large."""
    page = ""
    for longest in LONGEST:
        page = (
            _environment()
            .get_template(template)
            .render(
                **values,
                text=_cut(longest),
                written=datetime.now(UTC),
                style=_asset("style.css"),
                script=_asset("script.js"),
                mark=MARK,
                rows=ROWS,
                kl_levels=_level_names(),
            )
        )
        if len(page.encode(errors="replace")) <= LARGEST:
            break
    return page


def write_page(path: Path, page: str) -> None:
    """Write a page, never in place of a file that is none.

    Raises UserError (exit code 2) for another file there or a folder that is missing, and (exit
    code 3) for a full disk.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder", "--out", "make it, or choose another --out")
    if path.exists() and not is_page(path):
        raise UserError(
            f"{path} is there already, and is no report",
            where=str(path),
            fix="choose another --out, or remove it",
        )
    write_atomic(path, page)


def is_page(path: Path, state: str = "") -> bool:
    """Whether a file is a page that was written here, of a run in a `state` if that is given."""
    try:
        if not path.is_file():  # reading a pipe would never end
            return False
        with open(path, "rb") as file:
            head = file.read(MARK_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return False
    return MARK in head and f'data-state="{state}' in head


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # All text from models and files is escaped: only the style and the script are marked as safe.
    environment = Environment(
        loader=PackageLoader("minidistill.reporting.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "short": _short, "line": _line}
    environment.globals |= {"kl_level": kl_level, "verdict": verdict}
    return environment


@cache
def _asset(name: str) -> dict[str, Any]:
    """A file of the package: its `text`, and its `hash` in a Content-Security-Policy."""
    from markupsafe import Markup

    text = (files("minidistill.reporting.html") / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": Markup(text), "hash": f"sha256-{digest}"}


def _level_names() -> list[str]:
    names = [f"below {number(limit)}" for limit in KL_LEVELS]
    return [*names, f"{number(KL_LEVELS[-1])} and more"]


def _short(value: object) -> str:
    """A name on one line."""
    return bounded(clean(value), NAME)


def _line(value: object) -> str:
    """A text on one line."""
    return bounded(clean(value), LINE)


def _cut(longest: int) -> Callable[[object], str]:
    """What makes texts harmless: without control characters, with their line breaks, not longer."""

    def text(value: object) -> str:
        return printable(bounded(str(value), longest))

    return text
