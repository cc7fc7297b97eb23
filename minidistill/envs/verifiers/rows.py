"""Rows of an environment of verifiers as tasks, in two splits that share none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minidistill.envs.endpoint.chat import plain_message
from minidistill.errors import UserError
from minidistill.seeding import stable_seed
from minidistill.types import Task

logger = logging.getLogger(__name__)
HELD_OUT = 5
"""One row in so many is held out at most, if the environment has no rows for evaluation."""
NUMBERS = {"example_id", "idx"}
"""Keys of a row that only count it."""


@dataclass(frozen=True, slots=True)
class Row(Task):
    """A row as a task. `source` is what the environment takes: the row, or a task of its own."""

    source: Any = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Source:
    """A row before it is a task."""

    messages: tuple[dict[str, Any], ...]
    answer: Any
    content: Mapping[str, Any]
    """What tells it from others."""
    source: Any


def split_rows(
    train: Iterable[Source],
    held_out: Iterable[Source] | None,
    counts: tuple[int, int],
    seed: int,
    name: str,
) -> tuple[list[Row], list[Row]]:
    """At most so many training and held-out tasks. Equal rows are used once, and held out first.

    With `held_out` None the hash of a row, with `seed`, decides which are held out. Raises
    UserError for a split without any.
    """
    most_train, most_eval = counts
    rest = _different(train)
    if held_out is None:
        order = sorted(rest, key=lambda key: stable_seed(seed, "verifiers", key))
        kept = set(order[: min(most_eval, len(rest) // HELD_OUT)])
        evaluated = {key: row for key, row in rest.items() if key in kept}
    else:
        evaluated = dict(list(_different(held_out).items())[:most_eval])
    trained = {key: row for key, row in rest.items() if key not in evaluated}
    for split, found in (("training", trained), ("evaluation", evaluated)):
        if not found:
            raise UserError(
                f"verifiers: {name} has too few different rows for {split}",
                where="args",
                fix="lower num_eval_examples, or have the environment load more rows",
            )
    return (
        _tasks("train", list(trained.values())[:most_train]),
        _tasks("eval", list(evaluated.values())),
    )


def without_empty(message: Any) -> dict[str, Any]:
    """A message of verifiers as a plain dict, without the keys that have no value."""
    if hasattr(message, "model_dump"):
        message = message.model_dump()
    return {key: value for key, value in dict(message).items() if value is not None}


def plain_prompt(prompt: Any) -> tuple[dict[str, Any], ...]:
    """A prompt, which may be a text, as messages."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return tuple(plain_message(without_empty(message)) for message in prompt)


def _different(rows: Iterable[Source]) -> dict[str, Source]:
    """The rows by their contents, the first of equal ones."""
    by_content: dict[str, Source] = {}
    for row in rows:
        content = {key: value for key, value in row.content.items() if key not in NUMBERS}
        by_content.setdefault(json.dumps(content, sort_keys=True, default=str), row)
    return by_content


def _tasks(split: str, rows: list[Source]) -> list[Row]:
    return [
        Row(f"{split}/{number}", row.messages, row.answer, source=row.source)
        for number, row in enumerate(rows)
    ]
