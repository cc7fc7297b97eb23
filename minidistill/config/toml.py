"""TOML text for plain data: scalars, lists, tables and lists of tables. None is left out."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: Sequence[str | int]) -> str:
    """A path as users write it, `orchestrator.env.0.id`; unusual keys are quoted."""
    return ".".join(_key(str(part)) for part in path)


def inline(value: Any) -> str:
    """A value on one line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _quoted(value)
        case int() | float():
            return repr(value)
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat()
        case Mapping():
            pairs = [f"{_key(key)} = {inline(v)}" for key, v in value.items() if v is not None]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
        case list() | tuple():
            return f"[{', '.join(inline(item) for item in value)}]"
    raise TypeError(f"TOML has no {type(value).__name__}")


def to_toml(data: Mapping[str, Any]) -> str:
    """`data` as a TOML document that reads back equal."""
    return "\n".join(_table(data, ())).strip("\n") + "\n"


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    below: list[tuple[str, Any]] = []
    for key, value in data.items():
        if _has_header(value):
            below.append((key, value))
        elif value is not None:
            yield f"{_key(key)} = {_block(value) if isinstance(value, str) else inline(value)}"
    for key, value in below:
        here = (*path, key)
        if isinstance(value, Mapping):
            # A table that holds only tables needs no header of its own.
            if not value or not all(map(_has_header, value.values())):
                yield f"\n[{dotted(here)}]"
            yield from _table(value, here)
        else:
            for item in value:
                yield f"\n[[{dotted(here)}]]"
                yield from _table(item, here)


def _has_header(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_tables(value)


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves alone and TOML forbids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _block(text: str) -> str:
    """A string; one of several lines keeps them, as somebody would write a context."""
    if "\n" not in text:
        return _quoted(text)
    return '"""\n' + "\n".join(_quoted(line)[1:-1] for line in text.split("\n")) + '"""'
