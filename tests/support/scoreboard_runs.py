"""The beginning and the end of runs with given results: the real code, without a model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minidistill import logs
from minidistill.config import load_config
from minidistill.driver import summary
from minidistill.driver.baseline import evaluate_baseline
from minidistill.driver.selection import Selection, asked
from minidistill.evaluation.evaluator import Scores
from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.kl import SampledKL
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.trainer.policy import Weights
from minidistill.types import Prompt, Task
from support.paths import SOKOBAN

Rewards = dict[str, list[float]]
BEFORE, TEACHER, AFTER = (
    "I would guess that it is left.", "Arr, matey: hard to port!", "Arr: to port!",
)  # fmt: skip


def solved(count: int, tasks: int = 40) -> list[float]:
    """Rewards: the first `count` tasks are solved."""
    return [1.0] * count + [0.0] * (tasks - count)


@dataclass
class Results:
    """What a run measures. `rewards` has lists by environment."""

    before: Rewards = field(default_factory=dict)
    teacher: Rewards = field(default_factory=dict)
    after: Rewards = field(default_factory=dict)
    evaluates: bool = True
    kl: tuple[float, float] = (3.0, 0.125)
    """To the teacher on held-out prompts, before and after, nats a token."""
    unrelated: tuple[float, float] = (1.0, 0.5)
    drift: float = 0.0135
    prompts: int = 12
    teacher_kls: Sequence[float] = (3.5, 2.0, 0.5)
    """By step."""


class Runner:
    """A session with given results."""

    def __init__(self, path: Path, results: Results) -> None:
        names = list(results.after)
        flags = [] if names else ["--no-orchestrator.teacher_model.eval_baseline"]
        flags += ["--max_steps", str(len(results.teacher_kls))]
        self.config = load_config([SOKOBAN, *flags]).config
        self.results, self.trained = results, False
        (path / "rollouts").mkdir(parents=True)
        self.directory, self.stream = RunDirectory(path), io.StringIO()
        self.display = PlainDisplay(self.stream)
        self.policy = SimpleNamespace(teacher_weights=Weights.BASE, starts_as_base=True)
        self.monitor = SimpleNamespace(samples=lambda step, rows: None, close=lambda board: None)
        self.selection, self.asked = Selection(self.config), asked(self.config)
        self.last_step = self.config.max_steps
        self.evaluator = self if results.evaluates else None
        self.seconds, self.prompts = 73.0, dict.fromkeys(names)
        environment = SimpleNamespace(has_rewards=bool(names))
        environments = dict.fromkeys(names or ["jsonl"], environment)
        self.prepared = SimpleNamespace(
            environments=environments,
            context_count=1,
            evaluation_environments=environments if results.evaluates else {},
        )

    def run(self, label: str, role: object, *, context: bool) -> Scores:
        """As an evaluator."""
        before = self.results.teacher if context else self.results.before
        return Scores(self.results.after if self.trained else before, 12.0)

    def held_out(self) -> list[Prompt]:
        """As an evaluator."""
        tasks = [
            Task(str(i), ({"role": "user", "content": f"Where to, in case {i}?\nBe brief."},))
            for i in range(self.results.prompts)
        ]
        return [Prompt("jsonl", task, "", "", (), ()) for task in tasks]

    def evaluate(self, step: int) -> Scores:
        return self.run("student", None, context=False)

    def held_out_kl(self) -> SampledKL:
        kl = measured(self.results.kl[self.trained], self.results.prompts, self.trained)
        return replace(kl, prompts=self.held_out())

    def unrelated_kl(self) -> SampledKL:
        return measured(self.results.unrelated[self.trained], 16, self.trained)

    def drift_kl(self) -> float:
        return self.results.drift

    def teacher_texts(self) -> list[str]:
        return [TEACHER] * min(16, self.results.prompts)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.directory.log(step, metrics)


def measured(mean: float, prompts: int, trained: bool) -> SampledKL:
    """A KL with this mean over 4 tokens of each prompt; prompts differ from each other."""
    sums = [4 * mean * (0.75 if i % 2 else 1.25) for i in range(prompts)]
    sums[-1] += 4 * mean * prompts - sum(sums)
    if trained:
        sums.reverse()
    tokens = [4] * prompts
    return SampledKL(PromptSums(mean, sums, tokens), [AFTER if trained else BEFORE] * prompts)


def run(path: Path, results: Results) -> tuple[dict[str, Any], str]:
    """The scoreboard, and what the terminal shows from the baseline on."""
    session: Any = Runner(path, results)
    with logs.to_terminal(session.display.note), pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary.checkpoint, "save_model", lambda policy, path: path / "adapter")
        evaluate_baseline(session)
        for step, kl in enumerate(results.teacher_kls, 1):
            session.log(step, {"teacher_kl": kl})
        session.trained = True
        summary.finish(session)
    output = session.stream.getvalue().replace(str(path), "runs/a")
    return session.directory.read("scoreboard.json"), output
