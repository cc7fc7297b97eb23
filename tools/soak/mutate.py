"""Hostile inputs: texts, JSON values and flags, made from valid ones by a random generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

# Texts that programs trip over: control characters, terminal escapes, direction marks, surrogates,
# markup, paths, formats, numbers of other kinds, and much of anything.
TEXTS = (
    "", " ", "\0", "\n", "\r\n", "\x1b[2J\x1b[31m", "\x1b]0;title\x07", "\u202e\u2066abc", "\ufeff",
    "\u2028", "é" * 3, "𝕏", "\ud800", "{{ 7 * 7 }}", "{% for i in x %}", "<script>1</script>",
    "../../etc/passwd", "/dev/zero", "/dev/full", "/nowhere", "~", "%s%n", "$(id)", "a" * 300,
    "A" * 100_000, "nan", "inf", "-inf", "1e999", "0x10", "1_000", "None", "null", "true", "[", "{",
    "]" * 50, '"', "'", '"""', "'''", "\\", "#", "=", "a.b", "<|im_end|>", "<s>", "auto", "off",
    "(a+)+$", "(?P<x>", "*", "step_000001", "-1", "2023-01-01", "12:00:00Z",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 1.5,
)  # fmt: skip
NESTINGS = (60, 300, 2000, 200_000)


def value(random: Random, depth: int = 2) -> Any:
    """A JSON value, most of them wrong wherever they are put."""
    kind = random.randrange(9)
    if kind < 3:
        return random.choice(TEXTS)
    if kind < 6:
        return random.choice(NUMBERS)
    if kind == 6 or depth == 0:
        return random.choice([None, True, False])
    if kind == 7:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {random.choice(TEXTS): value(random, depth - 1) for _ in range(random.randrange(4))}


def change(random: Random, data: Any, keys: Sequence[str] = ()) -> Any:
    """A copy of a JSON value with one to three changes somewhere in it.

    New keys are some of `keys`, or hostile texts.
    """
    data = copy.deepcopy(data)
    for _ in range(random.randint(1, 3)):
        holders = [node for node in _nodes(data) if node]
        if not holders:
            return value(random)
        node = random.choice(holders)
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        place, action = random.choice(places), random.randrange(6)
        if action == 0:
            del node[place]
        elif action == 1 and isinstance(node, dict):
            node[random.choice([*keys, *TEXTS])] = value(random)
        elif action == 2 and isinstance(node, dict):
            node[random.choice([*keys, *TEXTS])] = node.pop(place)
        elif action == 3 and isinstance(node, list):
            node.insert(place, copy.deepcopy(node[place]))
        else:
            node[place] = value(random)
    return data


def _nodes(data: Any) -> list[Any]:
    """The tables and lists in `data`, itself included."""
    found, waiting = [], [data]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            found.append(node)
            waiting += node.values() if isinstance(node, dict) else node
    return found


def as_json(random: Random, data: Any) -> str:
    return json.dumps(data, ensure_ascii=random.random() < 0.5)


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def damage(random: Random, data: bytes, words: Sequence[bytes] = ()) -> bytes:
    """A file's content with one to three changes: bytes, lines, words, its length, its nesting."""
    for _ in range(random.randint(1, 3)):
        start = random.randint(0, len(data))
        end = min(len(data), start + random.choice([1, 1, 2, 8, 60, 1000]))
        match random.randrange(11):
            case 0:
                data = data[:start]
            case 1:
                data = data[:start] + data[end:]
            case 2:
                data = data[:end] + data[start:]
            case 3 if data:
                start = min(start, len(data) - 1)
                flipped = data[start] ^ (1 << random.randrange(8))
                data = data[:start] + bytes([flipped]) + data[start + 1 :]
            case 4:
                data = data[:start] + encode(random.choice(TEXTS)) + data[start:]
            case 5:
                number = str(random.choice(NUMBERS)) if random.random() < 0.5 else "9" * 5000
                data = data[:start] + number.encode() + data[end:]
            case 6:
                lines = data.split(b"\n")
                random.shuffle(lines)
                data = b"\n".join(lines)
            case 7:
                lines = data.split(b"\n")
                line = random.choice(lines)
                lines.insert(random.randint(0, len(lines)), line)
                data = b"\n".join(lines)
            case 8:
                depth = random.choice(NESTINGS)
                data = (
                    data[:start]
                    + random.choice([b"[", b"{", b'{"a":', b"("]) * depth
                    + data[start:]
                )
            case 9:
                data = (
                    data[:start]
                    + random.choice([b"\xff\xfe", b"\xc3", b"\x00", b"\r"])
                    + data[end:]
                )
            case _ if words:
                data = data[:start] + random.choice(words) + data[end:]
    return data
