"""Guards over the course of training, for what a single step does not show.

They read the metrics that are recorded, so a resumed run gets the same state from `metrics.jsonl`.
Every comparison asks whether a figure is fine, which NaN never is.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.config.health import HealthConfig
from minidistill.errors import EXIT_HEALTH, UserError

ENTROPY_FLOOR = 0.01  # nats a token
ENTROPY_SHARE = 0.1  # of the start
LIKE_TEACHER = 0.5  # of the teacher's entropy: the student is then as sure as it should be
LENGTH_FACTOR = 3.0  # of the start
TRUNCATED = 0.5  # share of the completions, and twice that of the start
KL_FACTOR = 4.0  # of the lowest mean over `patience` steps
KL_SHARE = 0.25  # of the start
KL_FLOOR = 0.05  # nats a token

ENTROPY, TEACHER_ENTROPY = "entropy/student", "entropy/teacher"
LENGTH, SHARE_TRUNCATED = "completions/length_mean", "completions/truncated_frac"
KL, GRADIENT, NO_ADVANTAGE = "teacher_kl", "optim/grad_norm", "advantage/zero_frac"
MEASURED = "loss/total"  # a record of a step has it, one of an evaluation does not

logger = logging.getLogger(__name__)


class Course:
    """The steps so far: what later ones are compared with."""

    def __init__(self, patience: int) -> None:
        self._first: list[Mapping[str, float]] = []
        self._recent: deque[float] = deque(maxlen=min(patience, sys.maxsize))
        self._patience = patience
        self.best_kl: float | None = None
        """The lowest mean KL of `patience` steps in a row; None before there are as many."""

    def add(self, figures: Mapping[str, float]) -> None:
        if len(self._first) < self._patience:
            self._first.append(figures)
        self._recent.append(figures[KL])
        if len(self._recent) == self._patience:
            mean = math.fsum(self._recent) / self._patience
            if math.isfinite(mean) and (self.best_kl is None or mean < self.best_kl):
                self.best_kl = mean

    def start(self, name: str) -> float | None:
        """A metric's mean over the first `patience` steps, None before there are as many."""
        if len(self._first) < self._patience:
            return None
        return math.fsum(figures[name] for figures in self._first) / self._patience


def _no_gradient(now: Mapping[str, float], course: Course) -> str | None:
    if now[GRADIENT] > 0 or now[KL] == 0:
        return None
    return f"the gradient is {now[GRADIENT]:g}, and the KL to the teacher is {now[KL]:.3g}"


def _entropy_collapse(now: Mapping[str, float], course: Course) -> str | None:
    entropy, start = now[ENTROPY], course.start(ENTROPY)
    kept = start is None or entropy >= ENTROPY_SHARE * start
    like_teacher = entropy >= LIKE_TEACHER * now[TEACHER_ENTROPY]
    if math.isnan(now[TEACHER_ENTROPY]):  # an engine scored the teacher
        like_teacher = now[KL] <= KL_FLOOR
    if (entropy >= ENTROPY_FLOOR and kept) or like_teacher:
        return None
    return f"the student's entropy is {entropy:.3g} nats a token{_after(start)}"


def _length_explosion(now: Mapping[str, float], course: Course) -> str | None:
    start, share_start = course.start(LENGTH), course.start(SHARE_TRUNCATED)
    if start is None or share_start is None:
        return None
    share = now[SHARE_TRUNCATED]
    if now[LENGTH] <= LENGTH_FACTOR * start and (share <= TRUNCATED or share <= 2 * share_start):
        return None
    return (
        f"completions have {now[LENGTH]:.3g} tokens{_after(start)}, and {share:.0%} are cut off"
        f"{_after(share_start)}"
    )


def _kl_explosion(now: Mapping[str, float], course: Course) -> str | None:
    start, best = course.start(KL), course.best_kl
    if start is None:
        return None
    limits = KL_FLOOR, KL_SHARE * start, KL_FACTOR * (math.nan if best is None else best)
    if any(now[KL] <= limit for limit in limits):
        return None
    return f"the KL to the teacher is {now[KL]:.3g}{_after(start)} and a lowest of {best or 0:.3g}"


def _equal_rewards(now: Mapping[str, float], course: Course) -> str | None:
    if now[NO_ADVANTAGE] < 1:
        return None
    return "the rewards of each group are equal, so the advantage is 0"


def _after(start: float | None) -> str:
    return "" if start is None else f", after {start:.3g} at the start"


@dataclass(frozen=True, slots=True)
class Guard:
    """One row of the table: the problem of a step, or None."""

    name: str
    """Its key in `[health]`."""
    wrong: Callable[[Mapping[str, float], Course], str | None]
    fix: str
    without: str = ""
    """A metric without which the guard does not apply."""


LOWER_RATE = "lower trainer.optim.lr"
GUARDS = (
    Guard("no_gradient", _no_gradient, "check trainer.loss, and the environment's rewards"),
    Guard(
        "entropy_collapse", _entropy_collapse, f"{LOWER_RATE}, or raise trainer.loss.student_tau"
    ),
    Guard("length_explosion", _length_explosion, f"{LOWER_RATE}, or check the reward"),
    Guard("kl_explosion", _kl_explosion, LOWER_RATE),
    Guard(
        "equal_rewards",
        _equal_rewards,
        "give it tasks that are solved sometimes, or a finer reward",
        without=NO_ADVANTAGE,
    ),
)
NAMES = (ENTROPY, TEACHER_ENTROPY, LENGTH, SHARE_TRUNCATED, KL, GRADIENT, NO_ADVANTAGE)


class Health:
    """The guards of a run, and for how many steps each has applied."""

    def __init__(self, config: HealthConfig, rollouts: Path) -> None:
        """`rollouts` is the folder that the messages refer to."""
        self._config, self._rollouts = config, rollouts
        self._course = Course(config.patience)
        self._steps = dict.fromkeys((guard.name for guard in GUARDS), 0)

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the steps of a resumed run, about which everything was said before."""
        for record in records:
            if MEASURED in record:
                self._judge(record)

    def take(self, step: int, metrics: Mapping[str, Any]) -> UserError | None:
        """Judge a step. Returns the error (exit code 4) of a guard that stops the run, else None.

        A guard that only warns does so when it begins to apply, and again after it did not.
        """
        error = None
        for guard, text in self._judge(metrics).items():
            steps, action = self._steps[guard.name], getattr(self._config, guard.name)
            if steps < self._config.patience:
                continue
            what = f"{text}, for {steps} step{'s' * (steps > 1)} in a row"
            path = self._rollouts / f"step_{step:06d}.jsonl"
            if action == "stop" and error is None:
                error = UserError(
                    f"step {step}: {what}",
                    where=f"health.{guard.name}",
                    fix=f"read {path}; {guard.fix}. The checkpoint of step {step} is saved: "
                    f'--resume continues from it, with --health.{guard.name} "warn" past this',
                    exit_code=EXIT_HEALTH,
                )
            elif action == "warn" and steps == self._config.patience:
                logger.warning(f"step {step}: {what} ({path}). If it stays so, {guard.fix}")
        return error

    def _judge(self, record: Mapping[str, Any]) -> dict[Guard, str]:
        """What is wrong, by guard. Counts the steps."""
        # as a resumed run reads them: what is not finite is null in the file
        figures = dict.fromkeys(NAMES, math.nan)
        figures |= {k: v for k in NAMES if (v := record.get(k)) is not None and math.isfinite(v)}
        found = {}
        for guard in GUARDS:
            absent = guard.without != "" and guard.without not in record
            text = None if absent else guard.wrong(figures, self._course)
            self._steps[guard.name] = 0 if text is None else self._steps[guard.name] + 1
            if text is not None:
                found[guard] = text
        self._course.add(figures)
        return found
