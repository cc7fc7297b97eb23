"""A configuration as a TOML document that people edit: short, and with comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tomli
import tomli_w

from minidistill.config.toml import dotted, inline, to_toml

INLINE = ("args", "chat_template_kwargs")
"""Tables that are written on one line."""


def document(data: Mapping[str, Any], title: str, comments: Mapping[str, str]) -> str:
    """`data` as TOML that reads back equal, below `title` as a comment.

    `comments` are those of tables and settings, by their dotted names without the numbers of lists.
    A table's is above it, a setting's on its line.
    """
    head = [f"# {line}" if line else "" for line in title.splitlines()]
    text = "\n".join([*head, *_table((), data, comments)]) + "\n"
    exact = to_toml(data)
    # what is odd (a context with "\r\n") is written as the configuration writes it
    return text if tomli.loads(text) == tomli.loads(exact) else "\n".join([*head, exact])


def _table(
    path: tuple[str, ...], table: Mapping[str, Any], comments: Mapping[str, str]
) -> Iterator[str]:
    """The lines of a table: its settings first, as TOML wants them, then the tables in it."""
    below = {key: value for key, value in table.items() if _is_table(key, value)}
    settings = {key: v for key, v in table.items() if key not in below and v is not None}
    for key, value in settings.items():
        comment = comments.get(".".join((*path, key)), "")
        yield from _setting(key, value, comment)
    for key, value in below.items():
        inner = (*path, key)
        for item in value if isinstance(value, list) else [value]:
            yield from _below(inner, item, comments, is_item=isinstance(value, list))


def _below(
    path: tuple[str, ...], table: Mapping[str, Any], comments: Mapping[str, str], *, is_item: bool
) -> Iterator[str]:
    has_settings = any(not _is_table(key, value) for key, value in table.items())
    if is_item or has_settings or not table:
        yield ""
        comment = comments.get(".".join(path), "")
        yield from (f"# {line}" for line in comment.splitlines())
        yield f"[[{dotted(path)}]]" if is_item else f"[{dotted(path)}]"
    yield from _table(path, table, comments)


def _setting(key: str, value: Any, comment: str) -> Iterator[str]:
    if isinstance(value, str) and "\n" in value:
        text = tomli_w.dumps({key: value}, multiline_strings=True).removesuffix("\n")
    else:
        text = f"{dotted((key,))} = {inline(value)}"
    yield f"{text:<35} # {comment}" if comment else text


def _is_table(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return key not in INLINE
    return isinstance(value, list) and bool(value) and all(isinstance(x, Mapping) for x in value)
