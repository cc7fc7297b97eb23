"""Where each key of a TOML file was written. tomli gives values, not their positions.

The text has been parsed already, so that only valid TOML comes here: what remains is to walk the
statements, stepping over strings and brackets, and to note the line of each header and key.
Keys inside an inline table or array have no entry; they are found at the key that holds them.
"""

from __future__ import annotations

import re

import tomli

from minidistill.config.schema_tree import Path

_STRING = r""""{3}(?:\\[\s\S]|[^\\])*?"{3}"{0,2}|'{3}[\s\S]*?'{3}'{0,2}|"(?:\\.|[^"\\])*"|'[^']*'"""
_VALUE = re.compile(rf"(?P<string>{_STRING})|#[^\n]*|(?P<open>[\[{{])|(?P<close>[\]}}])|(?P<nl>\n)")
_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_KEY = re.compile(r"""[ \t]*(?P<part>[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*')[ \t]*(?P<dot>\.?)""")


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of each key, table and list item that has a statement of its own."""
    lines: dict[Path, int] = {}
    items: dict[Path, int] = {}  # arrays of tables and how many items they have by now
    table: Path = ()
    at = _SPACE.match(text, 0).end()  # type: ignore[union-attr]  # matches the empty string too
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        brackets = 2 if text.startswith("[[", at) else int(text.startswith("[", at))
        key, at = _read_key(text, at + brackets)
        if brackets == 2:
            array = (*_under_last_items(key[:-1], items), key[-1])
            lines.setdefault(array, line)
            items[array] = items.get(array, 0) + 1
            table = (*array, items[array] - 1)
            lines[table] = line
        elif brackets:
            table = _under_last_items(key, items)
            lines.setdefault(table, line)
        else:
            for depth in range(1, len(key) + 1):
                lines.setdefault((*table, *key[:depth]), line)
        at = _SPACE.match(text, _end_of_statement(text, at + brackets)).end()  # type: ignore[union-attr]
    return lines


def _read_key(text: str, at: int) -> tuple[tuple[str, ...], int]:
    parts: list[str] = []
    while (found := _KEY.match(text, at)) is not None:
        part, at = found["part"], found.end()
        parts.append(next(iter(tomli.loads(f"{part} = 0"))))
        if not found["dot"]:
            break
    return tuple(parts), at


def _under_last_items(key: tuple[str, ...], items: dict[Path, int]) -> Path:
    """A header's key as a path: below an array of tables it means the latest item."""
    path: Path = ()
    for part in key:
        path = (*path, part)
        if path in items:
            path = (*path, items[path] - 1)
    return path


def _end_of_statement(text: str, at: int) -> int:
    depth = 0
    for found in _VALUE.finditer(text, at):
        depth += (found.lastgroup == "open") - (found.lastgroup == "close")
        if found.lastgroup == "nl" and depth <= 0:
            return found.end()
    return len(text)
