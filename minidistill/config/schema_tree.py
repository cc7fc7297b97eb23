"""The schema as a tree of JSON Schema nodes: which keys exist and what they take.

Command-line values, error messages and the reference page are all based on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from minidistill.config.schema import Config

Node = dict[str, Any]
Part = str | int
Path = tuple[Part, ...]

_SINGULAR = re.compile(r"\ban? (non-empty string|string|integer|number|URL)\b")

ANY: Node = {}
"""A free value, such as those of an environment's `args`."""


@cache
def root() -> Node:
    """The JSON Schema of the whole configuration."""
    return Config.model_json_schema()


def options(node: Node) -> list[Node]:
    """The members of a union with references resolved, or the node itself."""
    if "anyOf" in node:
        return [option for part in node["anyOf"] for option in options(part)]
    if "$ref" in node:
        return [root()["$defs"][node["$ref"].rpartition("/")[2]]]
    return [node]


def kinds(node: Node) -> set[str]:
    """JSON types that the node takes; empty for ANY."""
    return {option["type"] for option in options(node) if "type" in option}


def choices(node: Node) -> list[str]:
    """Fixed strings that the node takes."""
    strings: list[str] = []
    for option in options(node):
        strings += option.get("enum", [])
        strings += [option["const"]] if isinstance(option.get("const"), str) else []
    return strings


def table(node: Node) -> Node:
    """The table that the node is, may be, or is a list of; ANY if there is none."""
    for option in options(node):
        if "properties" in option:
            return option
        if option.get("type") == "array":
            return table(option["items"])
    return ANY


def properties(node: Node) -> dict[str, Node]:
    """The keys of a table, or of the tables in a list; empty for everything else."""
    return table(node).get("properties", {})


def child(node: Node, part: Part) -> Node | None:
    """The node at a key or a list index of `node`, or None."""
    if node is ANY:
        return ANY
    for option in options(node):
        if isinstance(part, int):
            if option.get("type") == "array":
                return option["items"]
        elif part in option.get("properties", {}):
            return option["properties"][part]
        elif option.get("additionalProperties") is True:
            return ANY
        elif isinstance(option.get("additionalProperties"), dict):
            return option["additionalProperties"]
    return None


def locate(parts: Sequence[Part]) -> tuple[Path, Node] | None:
    """The path and the node of a key as written, with list indices as digits; None if unknown."""
    node = root()
    path: Path = ()
    for part in parts:
        typed: Part = part
        if isinstance(part, str) and part.isdecimal() and len(part) < 6 and "array" in kinds(node):
            typed = int(part)
        below = child(node, typed)
        if below is None:
            return None
        node, path = below, (*path, typed)
    return path, node


def walk(node: Node | None = None, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every key below `node` with its path, in which "*" stands for list indices."""
    for key, below in properties(root() if node is None else node).items():
        key_path = (*path, key)
        yield key_path, below
        yield from walk(below, (*key_path, "*") if "array" in kinds(below) else key_path)


def describe(node: Node) -> str:
    """What the node takes, in words: `a number ≥ 0`."""
    if node is ANY:
        return "any value"
    texts = [f'"{choice}"' for choice in choices(node)]
    for option in options(node):
        if not _is_fixed(option) and (text := _describe(option)):
            texts.append(text)
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _is_fixed(option: Node) -> bool:
    """Whether `describe` needs no words for it: a fixed string, or null."""
    is_string = "enum" in option or isinstance(option.get("const"), str)
    return is_string or option.get("type") == "null"


def _describe(option: Node) -> str:
    kind = option.get("type")
    if "const" in option:
        return json.dumps(option["const"])
    if kind in ("integer", "number"):
        return f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(option)}"
    if kind == "array":
        filled = "non-empty " if option.get("minItems") else ""
        if properties(option["items"]):
            return f"a {filled}list of tables"
        items = _SINGULAR.sub(r"\1s", describe(option["items"]))
        return f"a {filled}list of {items}"
    if kind == "string":
        if "pattern" in option:  # only URLs have one
            return "a URL (http or https) without user, password and query"
        return "a non-empty string" if option.get("minLength") else "a string"
    return {"boolean": "true or false", "object": "a table"}.get(kind or "", "")


def _bounds(option: Node) -> str:
    low = option.get("minimum", option.get("exclusiveMinimum"))
    high = option.get("maximum", option.get("exclusiveMaximum"))
    above, below = "≥" if "minimum" in option else ">", "≤" if "maximum" in option else "<"
    texts = [f"{above} {low:g}"] if low is not None else []
    texts += [f"{below} {high:g}"] if high is not None else []
    return f" {' and '.join(texts)}" if texts else ""
