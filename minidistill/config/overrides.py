"""The command line as configuration: files and dotted overrides, in the order given.

The schema says how a value is read: a string field takes its text as it is, a list may be written
`0,1`, `0 1` or `[0,1]`, and free tables such as an environment's `args` take TOML values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomli

from minidistill.config import schema_tree as tree
from minidistill.config.errors import unknown_key
from minidistill.config.schema_tree import Node, Path
from minidistill.errors import UserError

_INTEGERS = re.compile(r"[\[\]\s,\d+-]+")


@dataclass(frozen=True, slots=True)
class Override:
    """One setting from the command line."""

    path: Path
    value: Any
    flag: str
    """As it was typed, without the value."""


def parse(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The files and the overrides that `argv` names."""
    files: list[str] = []
    overrides: list[Override] = []
    tokens = list(argv)
    for token in tokens:
        _check_encoding(token)
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--") and token != "--":
            overrides.append(_flag(token, tokens))
        elif token.startswith("-"):
            raise UserError(f"unknown option {token}", fix="overrides are written --a.b.c VALUE")
        elif token.startswith("@"):
            name = token[1:] or (tokens.pop(0) if tokens else "")
            if not name or name.startswith("--"):
                raise UserError("a file is expected after @", fix="write @ FILE.toml")
            files.append(name)
        else:
            files.append(token)
    return files, overrides


def _check_encoding(token: str) -> None:
    try:
        token.encode()
    except UnicodeEncodeError:
        raise UserError("an argument is not valid UTF-8", where=ascii(token)) from None


def _flag(token: str, rest: list[str]) -> Override:
    name, equals, inline = token[2:].partition("=")
    flag = f"--{name}"
    parts = [part.replace("-", "_") for part in name.split(".")]
    located = tree.locate(parts)
    if located is None:
        return _negated(parts, flag, bool(equals))
    path, node = located
    if equals:
        return Override(path, parse_value(inline, node), flag)
    return Override(path, _take(node, rest, flag), flag)


def _negated(parts: list[str], flag: str, has_value: bool) -> Override:
    """`--no-a.b` and `--a.no-b`: false for a boolean, absent for what is optional."""
    for at in (0, -1):
        if parts[at].startswith("no_"):
            stripped = list(parts)
            stripped[at] = parts[at].removeprefix("no_")
            located = tree.locate(stripped)
            if located is None:
                continue
            path, node = located
            kinds = tree.kinds(node)
            if has_value or not (node is tree.ANY or kinds & {"boolean", "null"}):
                raise UserError(
                    f"{flag} cannot be switched off",
                    fix=f"give it a value: --{'.'.join(stripped)} VALUE",
                )
            value = None if "null" in kinds and "boolean" not in kinds else False
            return Override(path, value, flag)
    raise unknown_key(tuple(parts), flag)


def _take(node: Node, rest: list[str], flag: str) -> Any:
    """The value of a flag from the tokens after it, which it removes."""
    kinds = tree.kinds(node)
    has_next = bool(rest) and not rest[0].startswith("--") and rest[0] != "@"
    if "object" in kinds and tree.properties(node):
        if has_next and kinds & {"null", "boolean"} and _is_bool(rest[0]):
            off = None if "null" in kinds else False
            return {} if rest.pop(0).lower() == "true" else off
        return _toml_or_text(rest.pop(0)) if has_next and rest[0].startswith("{") else {}
    if "boolean" in kinds:
        return parse_value(rest.pop(0), node) if has_next and _is_bool(rest[0]) else True
    if node is tree.ANY and not has_next:
        return True
    if not has_next:
        raise UserError(
            f"{flag} needs a value",
            where=flag,
            fix=f"it takes {tree.describe(node)}; a value that starts with -- goes after =",
        )
    texts = [rest.pop(0)]
    if "array" in kinds and texts[0] not in tree.choices(node) and not tree.properties(node):
        while rest and _continues_list(rest[0], _items(node)):
            texts.append(rest.pop(0))
    return parse_value(" ".join(texts), node)


def _continues_list(token: str, items: Node) -> bool:
    if "integer" in tree.kinds(items):
        return _INTEGERS.fullmatch(token) is not None
    return not token.startswith(("--", "@")) and not token.endswith(".toml")


def _items(node: Node) -> Node:
    return next(opt["items"] for opt in tree.options(node) if opt.get("type") == "array")


def parse_value(text: str, node: Node) -> Any:
    """`text` as the schema's `node` wants it; what does not fit is left for validation to refuse.

    >>> parse_value("0,1", {"type": "array", "items": {"type": "integer"}})
    [0, 1]
    """
    kinds, fixed = tree.kinds(node), tree.choices(node)
    if text in fixed:
        return text
    if "null" in kinds and "string" not in kinds and text.lower() in ("none", "null"):
        return None
    if "array" in kinds:
        return _list(text, node)
    if "string" in kinds and not (kinds & {"number", "integer"}):
        return text
    if "boolean" in kinds and _is_bool(text):
        return text.lower() == "true"
    return _toml_or_text(text)


def _list(text: str, node: Node) -> Any:
    items = _items(node)
    if tree.properties(items):
        return _toml_or_text(text)
    if text.lstrip().startswith("["):
        value = _toml_or_text(text)
        if isinstance(value, list):
            return value
        text = text.strip().removeprefix("[").removesuffix("]")
    return [parse_value(part, items) for part in re.split(r"[\s,]+", text) if part]


def _toml_or_text(text: str) -> Any:
    """A TOML value if the text is one and nothing else, or the text itself."""
    if "\n" in text or ("#" in text and not text.startswith(('"', "'", "[", "{"))):
        return text
    try:
        found = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return _json_table(text)
    return found["value"]


def _json_table(text: str) -> Any:
    """Tables and lists of them may also be written as JSON, as the public trainer's users do."""
    if text.startswith(("{", "[")) and "null" not in text:  # TOML has no null to keep it in
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")
