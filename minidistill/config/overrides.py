"""The configuration on the command line: files and dotted overrides, in their order.

The schema decides how a value is read: a string setting takes the text unchanged, a list may be
written `0,1`, `0 1` or `[0,1]`, and free tables such as an environment's `args` take TOML values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli

from minidistill.config import schema_tree as tree
from minidistill.config.errors import unknown_key
from minidistill.config.schema_tree import Node, Path
from minidistill.errors import UserError
from minidistill.system.files import DuplicateKeyError, InvalidJsonError, parse_json

DEEPEST = 64
"""Levels of tables and lists in a configuration."""
IN_PYTHON = "Python"
"""Where a setting was written that no file and no flag gives."""

_INTEGERS = re.compile(r"[\[\]\s,\d+-]+")


@dataclass(frozen=True, slots=True)
class Override:
    """A setting on the command line."""

    path: Path
    value: Any
    flag: str
    """As typed, without the value."""


def parse(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The files and the overrides in `argv`. Raises UserError for arguments that are neither."""
    files: list[str] = []
    overrides: list[Override] = []
    tokens = list(argv)
    for token in tokens:
        _check_encoding(token)
    while tokens:
        token = tokens.pop(0)
        if token.startswith("--") and token != "--":
            overrides.append(_override(token, tokens))
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


def from_mapping(settings: Mapping[str, Any]) -> list[Override]:
    """Settings that Python gives: nested tables, whose outer keys may be dotted as on the command
    line. Raises UserError for values that TOML does not have."""
    found = []
    for key, value in settings.items():
        parts = str(key).split(".")
        located = tree.locate(parts)
        path: Path = tuple(parts) if located is None else located[0]
        found.append(Override(path, _plain(value, str(key)), IN_PYTHON))
    return found


def _plain(value: Any, key: str, depth: int = 0) -> Any:
    """A value as TOML has it: a path is a string, a tuple a list."""
    if depth > DEEPEST:
        raise UserError(f"tables and lists are nested more than {DEEPEST} deep", key)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}.{i}", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise UserError(
        f"a setting cannot be of the type {type(value).__name__}",
        where=key,
        fix="give a string, a number, a boolean, a list or a dict",
    )


def _check_encoding(token: str) -> None:
    try:
        token.encode()
    except UnicodeEncodeError:
        raise UserError("an argument is not valid UTF-8", where=ascii(token)) from None


def _override(token: str, following: list[str]) -> Override:
    """What the flag `token` sets. A value from the `following` tokens is removed from them."""
    name, equals, text = token[2:].partition("=")
    flag = f"--{name}"
    parts = [part.replace("-", "_") for part in name.split(".")]
    if len(parts) > DEEPEST:
        raise UserError(f"no setting has {len(parts)} parts", flag, "see `minidistill config`")
    located = tree.locate(parts)
    if located is None:
        return _negated(parts, flag, bool(equals))
    path, node = located
    if equals:
        return Override(path, parse_value(text, node), flag)
    return Override(path, _take_value(node, following, flag), flag)


def _negated(parts: list[str], flag: str, has_value: bool) -> Override:
    """`--no-a.b` or `--a.no-b`: false for a boolean, None for an optional table or value."""
    for index in (0, -1):
        if parts[index].startswith("no_"):
            stripped = list(parts)
            stripped[index] = parts[index].removeprefix("no_")
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


def _take_value(node: Node, following: list[str], flag: str) -> Any:
    """The value of a flag from the tokens after it, which are removed."""
    kinds = tree.kinds(node)
    has_next = bool(following) and not following[0].startswith("--") and following[0] != "@"
    if "object" in kinds and tree.properties(node):
        if has_next and following[0] in tree.choices(node):
            return following.pop(0)
        if has_next and kinds & {"null", "boolean"} and _is_bool(following[0]):
            off = None if "null" in kinds else False
            return {} if following.pop(0).lower() == "true" else off
        if has_next and following[0].startswith("{"):
            return _toml_or_text(following.pop(0))
        return {}
    if "boolean" in kinds:
        has_value = has_next and (_is_bool(following[0]) or following[0] in tree.choices(node))
        return parse_value(following.pop(0), node) if has_value else True
    if node is tree.ANY and not has_next:
        return True
    if not has_next:
        raise UserError(
            f"{flag} needs a value",
            where=flag,
            fix=f"it takes {tree.describe(node)}; a value that starts with -- goes after =",
        )
    texts = [following.pop(0)]
    if "array" in kinds and texts[0] not in tree.choices(node) and not tree.properties(node):
        while following and _continues_list(following[0], _items(node)):
            texts.append(following.pop(0))
    return parse_value(" ".join(texts), node)


def _continues_list(token: str, items: Node) -> bool:
    if "integer" in tree.kinds(items):
        return _INTEGERS.fullmatch(token) is not None
    return not token.startswith(("--", "@")) and not token.endswith(".toml")


def _items(node: Node) -> Node:
    return next(option["items"] for option in tree.options(node) if option.get("type") == "array")


def parse_value(text: str, node: Node) -> Any:
    """`text` as a value for the schema's `node`; validation refuses what does not fit.

    >>> parse_value("0,1", {"type": "array", "items": {"type": "integer"}})
    [0, 1]
    """
    kinds = tree.kinds(node)
    if text in tree.choices(node):
        return text
    if "null" in kinds and "string" not in kinds and text.lower() in ("none", "null"):
        return None
    if "array" in kinds:
        return _list(text, node)
    if "boolean" in kinds and _is_bool(text):
        return text.lower() == "true"
    if "string" in kinds and not (kinds & {"number", "integer"}):
        return text
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
    """The TOML value that `text` is, or else `text` itself."""
    if "\n" in text or ("#" in text and not text.startswith(('"', "'", "[", "{"))):
        return text
    try:
        return tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return _json_or_text(text)


def _json_or_text(text: str) -> Any:
    """The JSON table or list that `text` is, as users of the public trainer write it, or `text`."""
    if text.startswith(("{", "[")) and "null" not in text:  # the run's TOML could not record it
        try:
            return parse_json(text)
        except DuplicateKeyError as error:
            raise UserError(str(error), where=text, fix="keep one of the two") from None
        except InvalidJsonError:
            pass
    return text


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")
