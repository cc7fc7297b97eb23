"""`minidistill config`: print every setting and where it comes from."""

from __future__ import annotations

import json
import sys

from minidistill.config.errors import short
from minidistill.config.layers import leaves
from minidistill.config.load import LoadedConfig
from minidistill.config.toml import dotted
from minidistill.errors import printable


def show_config(loaded: LoadedConfig, *, as_data: bool) -> None:
    """Print the configuration: as JSON with `as_data`, else as lines, or a table on a terminal."""
    if as_data:
        print(json.dumps({"config": loaded.resolved(), "provenance": loaded.provenance}, indent=2))
    elif sys.stdout.isatty():
        _print_table(_rows(loaded))
    else:
        _print_lines(_rows(loaded))
    sys.stdout.flush()


def _rows(loaded: LoadedConfig) -> list[tuple[str, str, str]]:
    """Key, value and origin of each setting, ready to print."""
    rows = []
    for path, value in leaves(loaded.resolved()):
        key = dotted(path)
        text = "-" if value is None else short(value)
        rows.append((printable(key), text, printable(loaded.provenance[key])))
    return rows


def _print_lines(rows: list[tuple[str, str, str]]) -> None:
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for key, value, origin in rows:
        print(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", box=None, pad_edge=False, header_style="bold")
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        table.add_row(Text(key, style), Text(value, style), Text(origin, style))
    Console().print(table)
