"""The schema as a tree of JSON Schema nodes: what exists at a dotted path and what it takes.

Help, value parsing, error messages and the reference page all read this one tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from minidistill.config.schema import Config

Node = dict[str, Any]
Part = str | int
Path = tuple[Part, ...]

ANY: Node = {}
"""What a free table such as an environment's `args` takes: anything."""


@cache
def root() -> Node:
    """The JSON Schema of the whole configuration."""
    return Config.model_json_schema()


def options(node: Node) -> list[Node]:
    """The alternatives of a node with references resolved; one for a node without a union."""
    if "anyOf" in node:
        return [option for part in node["anyOf"] for option in options(part)]
    if "$ref" in node:
        return [root()["$defs"][node["$ref"].rpartition("/")[2]]]
    return [node]


def kinds(node: Node) -> set[str]:
    """JSON types the node takes; empty for ANY."""
    return {option["type"] for option in options(node) if "type" in option}


def choices(node: Node) -> list[str]:
    """Fixed strings the node takes."""
    found: list[str] = []
    for option in options(node):
        found += option.get("enum", [])
        found += [option["const"]] if isinstance(option.get("const"), str) else []
    return found


def table(node: Node) -> Node:
    """The table that the node is, may be, or is a list of; ANY where there is none."""
    for option in options(node):
        if "properties" in option:
            return option
        if option.get("type") == "array":
            return table(option["items"])
    return ANY


def properties(node: Node) -> dict[str, Node]:
    """Keys of a table, or of the tables in a list; empty for everything else."""
    return table(node).get("properties", {})


def child(node: Node, part: Part) -> Node | None:
    """The node one key or list index further down, or None."""
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
    return None


def locate(parts: Sequence[Part]) -> tuple[Path, Node] | None:
    """The typed path and the node for parts as written, list indices as digits."""
    node = root()
    path: Path = ()
    for part in parts:
        typed: Part = part
        if isinstance(part, str) and part.isdecimal() and len(part) < 6 and "array" in kinds(node):
            typed = int(part)
        found = child(node, typed)
        if found is None:
            return None
        node, path = found, (*path, typed)
    return path, node


def walk(node: Node | None = None, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every key below `node` with its path; list items have "*" for their index."""
    for key, below in properties(root() if node is None else node).items():
        here = (*path, key)
        yield here, below
        yield from walk(below, (*here, "*") if "array" in kinds(below) else here)


def describe(node: Node) -> str:
    """What the node takes, in words: `a number ≥ 0`."""
    if node is ANY:
        return "any value"
    fixed = [f'"{choice}"' for choice in choices(node)]
    texts = [_describe(option) for option in options(node) if not _is_fixed(option)]
    takes = fixed + [text for text in texts if text]
    return " or ".join([", ".join(takes[:-1]), takes[-1]] if len(takes) > 1 else takes)


def _is_fixed(option: Node) -> bool:
    fixed = "enum" in option or isinstance(option.get("const"), str)
    return fixed or option.get("type") == "null"


def _describe(option: Node) -> str:
    kind = option.get("type")
    if "const" in option:
        return json.dumps(option["const"])
    if kind in ("integer", "number"):
        return f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(option)}"
    if kind == "array":
        few = "non-empty " if option.get("minItems") else ""
        if properties(option["items"]):
            return f"a {few}list of tables"
        inner = describe(option["items"]).replace("an integer", "integers")
        return f"a {few}list of {inner.replace('a non-empty string', 'non-empty strings')}"
    if kind == "string":
        return "a non-empty string" if option.get("minLength") else "a string"
    return {"boolean": "true or false", "object": "a table"}.get(kind or "", "")


def _bounds(option: Node) -> str:
    low = option.get("minimum", option.get("exclusiveMinimum"))
    high = option.get("maximum", option.get("exclusiveMaximum"))
    above, below = "≥" if "minimum" in option else ">", "≤" if "maximum" in option else "<"
    texts = [f"{above} {low:g}"] if low is not None else []
    texts += [f"{below} {high:g}"] if high is not None else []
    return f" {' and '.join(texts)}" if texts else ""
