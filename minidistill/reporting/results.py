"""A run's results as typed data: its state, its scoreboard, and its rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minidistill.reporting.run_lock import is_locked

Status = Literal["running", "finished", "stopped", "crashed"]


@dataclass(frozen=True, slots=True)
class Share:
    """The share of a gap that was closed: 1 is all of it."""

    value: float
    low: float | None
    """The ends of the 95% interval; None without one."""
    high: float | None


@dataclass(frozen=True, slots=True)
class Scoreboard:
    """What a run has reached. Figures that were not computed are None.

    Scores are mean rewards, KLs are nats a token. docs/concepts.md explains each of them.
    """

    verdict: str
    outcome: str | None
    """`closed`, `partly`, `none`, `worse`, `no_gap`, `context_harms`, `too_few_tasks` and so on."""
    judged_by: str | None
    """`score` or `teacher_kl`: what the verdict is about."""
    baseline_student: float | None
    baseline_teacher: float | None
    student: float | None
    student_with_context: float | None
    gap_closed: Share | None
    heldout_kl_closed: Share | None
    teacher_kl_first: float | None
    teacher_kl_last: float | None
    heldout_kl_before: float | None
    heldout_kl_after: float | None
    drift_kl: float | None
    eval_tasks: int | None
    steps: int | None
    seconds: float | None
    missing: tuple[str, ...]
    """Figures that are still to be computed: the run was cut off while it ended."""
    raw: Mapping[str, Any] = field(repr=False)
    """All of `scoreboard.json`."""

    @classmethod
    def of(cls, board: Mapping[str, Any]) -> Scoreboard:
        """The content of `scoreboard.json`. A value of another type counts as none."""

        def text(key: str) -> str | None:
            value = board.get(key)
            return value if isinstance(value, str) else None

        def figure(key: str) -> float | None:
            value = board.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return None
            return float(value) if math.isfinite(value) else None

        def count(key: str) -> int | None:
            value = figure(key)
            return None if value is None else int(value)

        def share(key: str) -> Share | None:
            value = figure(key)
            ends = figure(f"{key}_low"), figure(f"{key}_high")
            return None if value is None else Share(value, *ends)

        missing = board.get("missing")
        return cls(
            verdict=text("verdict") or "",
            outcome=text("outcome"),
            judged_by=text("judged_by"),
            baseline_student=figure("baseline_student"),
            baseline_teacher=figure("baseline_teacher"),
            student=figure("student"),
            student_with_context=figure("student_with_context"),
            gap_closed=share("gap_closed"),
            heldout_kl_closed=share("heldout_kl_closed"),
            teacher_kl_first=figure("teacher_kl_first"),
            teacher_kl_last=figure("teacher_kl_last"),
            heldout_kl_before=figure("heldout_kl_before"),
            heldout_kl_after=figure("heldout_kl_after"),
            drift_kl=figure("drift_kl"),
            eval_tasks=count("eval_tasks"),
            steps=count("steps"),
            seconds=figure("seconds"),
            missing=tuple(map(str, missing)) if isinstance(missing, list) else (),
            raw=board,
        )


@dataclass(frozen=True, slots=True)
class HeldOutSample:
    """Completions for a held-out prompt; None for one that was not sampled."""

    prompt: str
    before: str | None
    """The student's, before training."""
    teacher: str | None
    """In context, before training."""
    after: str | None
    """The student's, after training."""


@dataclass(frozen=True, slots=True)
class LoggedRollout:
    """A completion that was trained on."""

    step: int
    env: str
    task_id: str
    sample: int
    """Its number among the completions of its prompt."""
    prompt: str
    """What the student read."""
    teacher_prompt: str
    """What the teacher read."""
    completion: str
    reward: float | None
    advantage: float | None
    truncated: bool
    tokens: tuple[str, ...]
    kl: tuple[float, ...]
    """KL(student‖teacher) of each token, nats."""
    gaps: tuple[float, ...]
    """log π(y) - log q(y) of each token: how much likelier it is to the student."""

    @classmethod
    def of(
        cls, step: int, row: Mapping[str, Any], kl: Sequence[float], gaps: Sequence[float]
    ) -> LoggedRollout:
        """A line of the log, and the figures of its tokens."""
        return cls(
            step=step,
            env=row["env"],
            task_id=row["task_id"],
            sample=row["sample"],
            prompt=row["prompt_text"],
            teacher_prompt=row["teacher_prompt_text"],
            completion=row["completion"],
            reward=row["reward"],
            advantage=row["advantage"],
            truncated=row["truncated"],
            tokens=tuple(row["tokens"]),
            kl=tuple(kl),
            gaps=tuple(gaps),
        )


def read_status(path: Path, board: Scoreboard | None, steps: int | None) -> Status:
    """Whether the run in `path` is going on, has finished, or has ended before.

    `stopped` is a run that ended between two steps (Ctrl-C, SIGTERM, a health check) and has saved
    all that it did; `crashed` is one that ended otherwise. Both can be resumed. `steps` is the
    last step with metrics.
    """
    if is_locked(path):
        return "running"
    if board is not None and not board.missing:
        return "finished"
    latest = path / "checkpoints" / "latest"
    saved = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    return "stopped" if board is None and saved == f"step_{steps or 0:06d}" else "crashed"
