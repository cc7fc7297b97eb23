"""Reads a run directory that may be incomplete or damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidistill.errors import UserError

RUN_FILES = ("metrics.jsonl", "scoreboard.json", "config.resolved.json", "config.toml")
"""A directory with none of these holds no run."""
MAX_ROLLOUTS = 3
"""Rollouts shown for each step."""
MAX_TOKENS = 400
"""Tokens shown for each rollout."""

_STEP = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """A rollout as the page shows it: its first tokens, each with its KL or None."""

    env: str
    task: str
    reward: float | None
    stop: str
    teacher_prompt: str
    tokens: tuple[tuple[str, float | None], ...]
    hidden: int


@dataclass(frozen=True, slots=True)
class Run:
    """The readable files. `steps` is {step: {metric: value}}.

    `damage` says which files are damaged, `notes` also what is missing.
    """

    name: str
    steps: dict[int, dict[str, float]]
    board: dict[str, Any]
    config: str
    env: dict[str, Any]
    rollouts: tuple[tuple[int, tuple[ShownRollout, ...]], ...]
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def read_run(run_dir: Path) -> Run:
    """Read the files that exist. Raises UserError (exit code 2) if there are none."""
    if not any((run_dir / name).is_file() for name in RUN_FILES):
        raise UserError(
            f"{run_dir} is not a run directory",
            where=str(run_dir),
            fix="give the output directory of a run; it contains metrics.jsonl and config.toml",
        )
    damage: list[str] = []
    steps = _steps(run_dir / "metrics.jsonl", damage)
    board = _object(run_dir / "scoreboard.json", damage)
    env = _object(run_dir / "env.json", damage)
    rollouts = tuple(_selected(run_dir / "rollouts", damage))
    notes = list(damage)
    if not steps:
        notes.append("There are no metrics yet.")
    if not board:
        notes.append("There is no scoreboard: the run has not finished.")
    return Run(
        name=run_dir.resolve().name,
        steps=steps,
        board=board,
        config=_read(run_dir / "config.toml") or "",
        env=env,
        rollouts=rollouts,
        notes=notes,
        damage=damage,
    )


def _read(path: Path) -> str | None:
    try:
        # reading a pipe would never end
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None


def _parse(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for any other text."""
    try:
        value = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _integer(text: str) -> int | float:
    """An integer; one that no float can hold is infinite, as a number with a point would be."""
    return int(text) if len(text) < 300 else float(text)


def _object(path: Path, damage: list[str]) -> dict[str, Any]:
    text = _read(path)
    if text is None:
        return {}
    value = _parse(text)
    if value is None:
        damage.append(f"{path.name} is damaged and was left out.")
    return value or {}


def _lines(path: Path, damage: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A killed run leaves half a line at its end."""
    count = 0
    for line in (_read(path) or "").split("\n"):
        if not line.strip():
            continue
        value = _parse(line)
        if value is None:
            count += 1
        else:
            yield value
    if count:
        damage.append(f"{path.name}: {count} damaged line{'s' * (count > 1)} left out.")


def _steps(path: Path, damage: list[str]) -> dict[int, dict[str, float]]:
    """Metrics by step. Of two values for one step the later one counts."""
    steps: dict[int, dict[str, float]] = {}
    for row in _lines(path, damage):
        step = row.pop("step", None)
        if isinstance(step, bool) or not isinstance(step, int):
            continue
        values = {k: f for k, v in row.items() if (f := _float(v)) is not None}
        steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _selected(directory: Path, damage: list[str]) -> Iterator[tuple[int, tuple[ShownRollout, ...]]]:
    """A few rollouts of the first, the middle and the last recorded step."""
    if not directory.is_dir():
        return
    files = {int(m[1]): p for p in directory.iterdir() if (m := _STEP.fullmatch(p.name))}
    steps = sorted(files)
    selected = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
    for step in sorted(selected):
        by_task: dict[str, tuple[int, dict[str, Any]]] = {}
        for index, row in enumerate(_lines(files[step], damage)):
            # One rollout of each task tells more than several of one.
            by_task.setdefault(f"{row.get('env')}/{row.get('task_id')}", (index, row))
        rows = list(by_task.values())[:MAX_ROLLOUTS]
        tensors = files[step].with_suffix(".safetensors")
        kl = _kl(tensors, [index for index, _ in rows])
        if kl is None:
            damage.append(f"{tensors.name} cannot be read: the tokens have no colors.")
            kl = {}
        yield step, tuple(_shown(row, kl.get(index)) for index, row in rows)


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
        reward=_float(row.get("reward")),
        stop=str(row.get("stop") or ""),
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
    except (TypeError, KeyError, ValueError):
        return tokens, values
    for at, text in sorted(pieces, reverse=True):
        if 0 <= at <= len(tokens):
            tokens = [*tokens[:at], text, *tokens[at:]]
            values = [*values[:at], None, *values[at:]]
    return tokens, values
