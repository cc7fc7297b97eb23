"""A few of a run's rollouts, with the KL of their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.reporting.html.files import figure, lines

MAX_ROLLOUTS = 3
"""Rollouts shown for each step."""
MAX_TOKENS = 400
"""Tokens shown for each rollout."""

_STEP = re.compile(r"step_(\d{1,12})\.jsonl")


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """A rollout as the page shows it: its first tokens, each with its KL or None."""

    env: str
    task: str
    reward: float | None
    stop: str
    prompt: str
    teacher_prompt: str
    tokens: tuple[tuple[str, float | None], ...]
    hidden: int


def selected(directory: Path, damage: list[str]) -> Iterator[tuple[int, tuple[ShownRollout, ...]]]:
    """A few rollouts of the first, the middle and the last recorded step."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return
    files = {int(m[1]): directory / name for name in names if (m := _STEP.fullmatch(name))}
    steps = sorted(files)
    chosen = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
    for step in sorted(chosen):
        rows = list(_first_of_tasks(files[step], damage))
        tensors = files[step].with_suffix(".safetensors")
        kl = _kl(tensors, [index for index, _ in rows])
        if kl is None:
            damage.append(f"{tensors.name} cannot be read: the tokens have no colors.")
            kl = {}
        yield step, tuple(_shown(row, kl.get(index)) for index, row in rows)


def _first_of_tasks(path: Path, damage: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One rollout of each of a few tasks, which tells more than several of one, and its index.

    The rest of the file, which may be large, is not read.
    """
    tasks: set[str] = set()
    for index, row in enumerate(lines(path, damage)):
        task = f"{row.get('env')}/{row.get('task_id')}"
        if task not in tasks:
            tasks.add(task)
            yield index, row
        if len(tasks) == MAX_ROLLOUTS:
            return


def _kl(path: Path, indices: list[int]) -> dict[int, list[float]] | None:
    """Per-token KL of rollouts by their index, empty without a file; None if it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), framework="numpy") as tensors:
            bounds, kl = tensors.get_tensor("offsets"), tensors.get_tensor("kl")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None
    if (bounds.ndim, bounds.dtype.kind, kl.ndim, kl.dtype.kind) != (1, "i", 1, "f"):
        return None
    offsets = bounds.tolist()
    return {
        i: kl[offsets[i] : offsets[i + 1]].astype(float).tolist()
        for i in indices
        if i + 1 < len(offsets) and 0 <= offsets[i] <= offsets[i + 1] <= len(kl)
    }


def _shown(row: dict[str, Any], kl: list[float] | None) -> ShownRollout:
    tokens = row.get("tokens")
    tokens = [str(t) for t in tokens] if isinstance(tokens, list) else [str(row.get("completion"))]
    # Better no colors than those of other tokens.
    values: list[float | None] = [None] * len(tokens)
    if kl is not None and len(kl) == len(tokens):
        values = list(kl)
    tokens, values = _with_inserted(tokens, values, row.get("inserted"))
    return ShownRollout(
        env=str(row.get("env") or ""),
        task=str(row.get("task_id") or ""),
        reward=figure(row.get("reward")),
        stop=str(row.get("stop") or ""),
        prompt=str(row.get("prompt_text") or ""),
        teacher_prompt=str(row.get("teacher_prompt_text") or ""),
        tokens=tuple(zip(tokens, values, strict=True))[:MAX_TOKENS],
        hidden=max(0, len(tokens) - MAX_TOKENS),
    )


def _with_inserted(
    tokens: list[str], values: list[float | None], inserted: object
) -> tuple[list[str], list[float | None]]:
    """The tokens with what an environment wrote between them, which has no color."""
    try:
        pieces = [(int(each["at"]), str(each["text"])) for each in inserted or ()]  # type: ignore[attr-defined]
    except (TypeError, KeyError, ValueError, OverflowError):  # the last for infinity
        return tokens, values
    for at, text in sorted(pieces, reverse=True):
        if 0 <= at <= len(tokens):
            tokens = [*tokens[:at], text, *tokens[at:]]
            values = [*values[:at], None, *values[at:]]
    return tokens, values
