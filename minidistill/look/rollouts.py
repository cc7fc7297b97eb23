"""A run's recorded rollouts: read, checked and chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.records import rollout_names
from minidistill.reporting.run_directory import RESOLVED, SCOREBOARD
from minidistill.system.files import InvalidJsonError, parse_json, read_text
from minidistill.system.run_folders import SETTINGS, no_run

LARGEST = 1 << 30
"""Bytes of a step's lines."""
RESTORE = "restore it from a copy"
_STEP = re.compile(r"step_([0-9]{6,})\.jsonl")
_FIGURES = ("kl", "student_logprobs", "teacher_logprobs")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One rollout: its line, and a figure for each of its sampled tokens, in nats."""

    step: int
    row: Mapping[str, Any]
    kl: Sequence[float]
    """KL(student‖teacher), or its estimate from the sampled token."""
    gaps: Sequence[float]
    """log π(y) - log q(y)."""

    @property
    def task(self) -> str:
        return str(self.row.get("task_id"))

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl)) if self.kl else math.nan

    @property
    def badness(self) -> float:
        """The mean KL. What is no number is worse than any."""
        return self.mean_kl if math.isfinite(self.mean_kl) else math.inf

    def as_data(self) -> dict[str, Any]:
        """The line, with the figures of its tokens; null for what is no number."""
        lists = {"kl": self.kl, "logprob_gaps": self.gaps}
        finite = {k: [v if math.isfinite(v) else None for v in vs] for k, vs in lists.items()}
        mean = self.mean_kl if math.isfinite(self.mean_kl) else None
        return {**self.row, "mean_kl": mean, **finite}


# -- reading ---------------------------------------------------------------------------------------


def read_rollouts(
    run: Path, step: int | None = None, task: str | None = None, worst: int | None = None
) -> list[Recorded]:
    """The rollouts of a step, or of one task, or the `worst` by their mean KL to the teacher.

    Without `step` they are those of the last recorded one, or with `task` or `worst` those of all.
    Raises UserError if there are none, exit code 3 if a file is damaged.
    """
    steps = _steps(run)
    if step is not None and step not in steps:
        known = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
        what = f"the run in {run} has no rollouts of step {step}"
        raise UserError(what, "--step", f"give one of {known}")
    if step is not None:
        steps = [step]
    else:
        # a run in progress writes the tensors of a step after its lines
        unfinished = not (run / SCOREBOARD).exists()
        if unfinished and len(steps) > 1 and not (run / rollout_names(steps[-1])[1]).exists():
            steps.pop()
        if task is None and worst is None:
            steps = steps[-1:]
    chosen: list[Recorded] = []
    for each in steps:
        found = read_step(run, each)
        chosen += [r for r in found if task is None or r.task == task]
        if worst is not None:  # a long run's would fill the memory
            chosen = sorted(chosen, key=lambda r: -r.badness)[:worst]
    if not chosen:
        what = f"no rollout of the task {task!r} is recorded" if task else "no rollout is recorded"
        ids = list(dict.fromkeys(r.task for r in read_step(run, steps[-1])))[:3]
        fix = f"its tasks of step {steps[-1]} are {', '.join(ids)}, …" if ids else ""
        raise UserError(what, "--task", fix)
    return chosen


def _steps(run: Path) -> list[int]:
    if not any((run / name).is_file() for name in (RESOLVED, SETTINGS)):
        raise no_run(run, "give the output directory of a run; it contains config.toml")
    folder = run / "rollouts"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
    if not steps:
        raise UserError(
            f"the run in {run} has recorded no rollouts yet",
            where=str(folder),
            fix="wait for its first step",
        )
    return steps


def read_step(run: Path, step: int) -> list[Recorded]:
    """All rollouts of a step. Raises UserError (exit code 3) if their files are damaged."""
    lines, tensors = (run / name for name in rollout_names(step))
    rows = list(_rows(lines))
    figures = _tensors(tensors)
    offsets = figures["offsets"].tolist()
    sizes = [len(row["tokens"]) for row in rows]
    ends = {len(figures[name]) for name in _FIGURES}
    if [b - a for a, b in pairwise(offsets)] != sizes or ends != {sum(sizes)} or offsets[0] != 0:
        raise _damaged(tensors, f"it does not have the tokens of {lines.name}")
    found = []
    for row, (start, end) in zip(rows, pairwise(offsets), strict=True):
        kl, student, teacher = (figures[name][start:end].astype(float) for name in _FIGURES)
        found.append(Recorded(step, row, kl.tolist(), (student - teacher).tolist()))
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a step: objects with the texts of their tokens."""
    try:
        text = read_text(path, limit=LARGEST)
    except UserError as error:
        raise _damaged(path, error.what) from None
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            row = parse_json(line)
        except InvalidJsonError as error:
            raise _damaged(path, f"line {line_number}: {error}") from None
        tokens = row.get("tokens") if isinstance(row, dict) else None
        if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
            raise _damaged(path, f"line {line_number} has no tokens")
        yield row


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    names = ("offsets", *_FIGURES)
    try:
        found = load(path.read_bytes()) if path.is_file() else None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    if found is None:
        raise _damaged(path, "it is missing")
    if missing := [name for name in names if name not in found]:
        raise _damaged(path, f"it lacks {missing[0]}")
    kinds = {name: found[name].dtype.kind for name in names}
    whole = kinds.pop("offsets") == "i"
    if not whole or any(found[name].ndim != 1 for name in names) or {*kinds.values()} - {"i", "f"}:
        raise _damaged(path, "its tensors have other shapes or types")
    return {name: found[name] for name in names}


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}", str(path), RESTORE, EXIT_ENVIRONMENT)
