"""The settings of several runs, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minidistill.reporting.formatting import clean

IGNORED = ("output_dir",)
"""Settings that differ between any two runs."""
ABSENT = "–"


def differences(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """The settings that are not equal in all runs: the dotted name, and each run's value."""
    flat = [_flatten(each) for each in settings]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [(name, tuple(each.get(name, ABSENT) for each in flat)) for name in names]
    return [(n, values) for n, values in rows if n not in IGNORED and len(set(values)) > 1]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Each value as JSON by its dotted name; of a list of tables by the table's number, from 1."""
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        children = {str(number): each for number, each in enumerate(value, 1)}.items()
    else:
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    flat: dict[str, str] = {}
    for name, child in children:
        name = clean(name)
        flat |= _flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat
