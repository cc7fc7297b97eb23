"""TOML: data as a document, a value on one line, and the line on which each key was written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tomli
import tomli_w

from minidistill.config.schema_tree import Path

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

# tomli gives values without positions. What follows walks the statements of a valid document.
_STRING = r""""{3}(?:\\[\s\S]|[^\\])*?"{3}"{0,2}|'{3}[\s\S]*?'{3}'{0,2}|"(?:\\.|[^"\\])*"|'[^']*'"""
_TOKEN = re.compile(rf"{_STRING}|#[^\n]*|(?P<open>[\[{{])|(?P<close>[\]}}])|(?P<newline>\n)")
_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_KEY = re.compile(r"""[ \t]*(?P<part>[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*')[ \t]*(?P<dot>\.?)""")


def to_toml(data: Mapping[str, Any]) -> str:
    """`data` as a TOML document that reads back equal, without what is None."""
    data = _without_none(data)
    text = tomli_w.dumps(data, multiline_strings=True)
    # tomli_w writes "\r\n" in a string of several lines as "\n". On one line each string is exact.
    return text if tomli.loads(text) == data else tomli_w.dumps(data)


def inline(value: Any) -> str:
    """A value on one line. tomli_w spreads lists and tables over several."""
    match value:
        case Mapping():
            pairs = [f"{_key(key)} = {inline(v)}" for key, v in value.items() if v is not None]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
        case list() | tuple():
            return f"[{', '.join(inline(item) for item in value)}]"
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").removesuffix("\n")


def dotted(path: Sequence[str | int]) -> str:
    """A path as users write it, `orchestrator.env.0.id`; unusual keys are quoted."""
    return ".".join(_key(str(part)) for part in path)


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of each key, table and list item that has a statement of its own.

    `text` is valid TOML. Keys within an inline table or array have no entry: they are on the line
    of the key that holds them, or on one of the next.
    """
    lines: dict[Path, int] = {}
    lengths: dict[Path, int] = {}  # of the arrays of tables, so far
    table: Path = ()
    position = _skip_space(text, 0)
    line, counted = 1, 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        brackets = 2 if text.startswith("[[", position) else int(text[position] == "[")
        key, position = _read_key(text, position + brackets)
        if brackets == 2:
            array = (*_under_last_items(key[:-1], lengths), key[-1])
            lines.setdefault(array, line)
            lengths[array] = lengths.get(array, 0) + 1
            table = (*array, lengths[array] - 1)
            lines[table] = line
        elif brackets:
            table = _under_last_items(key, lengths)
            lines.setdefault(table, line)
        else:
            for depth in range(1, len(key) + 1):
                lines.setdefault((*table, *key[:depth]), line)
        position = _skip_space(text, _end_of_statement(text, position + brackets))
    return lines


def _without_none(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _without_none(v) for key, v in value.items() if v is not None}
        case list() | tuple():
            return [_without_none(item) for item in value]
    return value


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else inline(key)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "it matches the empty string too"
    return match.end()


def _read_key(text: str, position: int) -> tuple[tuple[str, ...], int]:
    """The parts of the dotted key at `position`, and the position after it."""
    parts: list[str] = []
    while (match := _KEY.match(text, position)) is not None:
        position = match.end()
        part = match["part"]
        parts.append(next(iter(tomli.loads(f"{part} = 0"))) if part[0] in "\"'" else part)
        if not match["dot"]:
            break
    return tuple(parts), position


def _under_last_items(key: tuple[str, ...], lengths: dict[Path, int]) -> Path:
    """A header's key as a path: within an array of tables it means the latest item."""
    path: Path = ()
    for part in key:
        path = (*path, part)
        if path in lengths:
            path = (*path, lengths[path] - 1)
    return path


def _end_of_statement(text: str, position: int) -> int:
    depth = 0
    for token in _TOKEN.finditer(text, position):
        depth += (token.lastgroup == "open") - (token.lastgroup == "close")
        if token.lastgroup == "newline" and depth <= 0:
            return token.end()
    return len(text)
