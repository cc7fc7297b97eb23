"""Files that may be missing, damaged, or no files at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 1e200
"""No figure of a run is larger. A chart's arithmetic would overflow."""
LOG_BYTES = 8_000
"""Read of the end of the log."""


def read(path: Path) -> str | None:
    """A file's text, None without one."""
    try:
        # reading a pipe would never end
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None


def read_end(path: Path) -> str:
    """The last whole lines of a text file, empty without one."""
    try:
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - LOG_BYTES)
            file.seek(start)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if start else text


def parse(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for any other text."""
    try:
        value = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _integer(text: str) -> int | float:
    """An integer; one that no float can hold is infinite, as a number with a point would be."""
    return int(text) if len(text) < 300 else float(text)


def read_object(path: Path, damage: list[str]) -> dict[str, Any]:
    """The object in a JSON file, empty without one; a damaged one is added to `damage`."""
    text = read(path)
    if text is None:
        return {}
    value = parse(text)
    if value is None:
        damage.append(f"{path.name} is damaged and was left out.")
    return value or {}


def lines(path: Path, damage: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A killed run leaves half a line at its end."""
    count = 0
    try:
        if not path.is_file():
            return
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if not line.strip():
                    continue
                value = parse(line)
                if value is None:
                    count += 1
                else:
                    yield value
    except OSError:
        damage.append(f"{path.name} cannot be read.")
    if count:
        damage.append(f"{path.name}: {count} damaged line{'s' * (count > 1)} left out.")


def figure(value: Any) -> float | None:
    """A number as a float, None for what is none; one out of all measure is infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else number * float("inf")
