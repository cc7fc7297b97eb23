"""Conversations on the shipped model: a collector, an evaluator, an engine that keeps its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minidistill.envs.registry import load_environments
from minidistill.errors import UserError
from minidistill.evaluation.evaluator import Evaluator
from minidistill.reporting.terminal import open_display
from minidistill.rollouts.collector import Collector
from minidistill.types import Completion, Role, Rollout
from support.lab import cpu_placement, make_lab

ARGS = "--orchestrator.env.0.args."
MULTI = (f"{ARGS}mode", "multi", f"{ARGS}max_turns", "3")
STEP = (
    "--orchestrator.batch_size", "8", "--orchestrator.rollouts_per_example", "4",
    f"{ARGS}num_train_examples", "8", f"{ARGS}num_eval_examples", "4", "--seq_len", "320",
)  # fmt: skip
ECHO = ("--orchestrator.env", '[{id = "support.multi_turn:load", name = "echo"}]')


class Recording:
    """An engine that keeps what it was asked and what it sampled."""

    def __init__(self, engine: Any, fails_at: int | None = None) -> None:
        self.engine, self.fails_at = engine, fails_at
        self.calls: list[tuple[Sequence[Any], Sequence[Completion], Role]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Any, params: Any, role: Role, *rest: Any) -> list[Completion]:
        if len(self.calls) == self.fails_at:
            raise UserError("the engine died", "there", "start it again")
        completions: list[Completion] = self.engine.generate(requests, params, role, *rest)
        self.calls.append((requests, completions, role))
        return completions


class Stage:
    """A lab with a collector of multi-turn environments."""

    def __init__(self, loaded: Any, fails_at: int | None = None) -> None:
        self.loaded, self.lab = loaded, make_lab(loaded)
        self.engine: Any = Recording(self.lab.engine, fails_at)
        self.environments = load_environments(loaded.config.orchestrator.env, "")
        self.display = open_display()
        self.placement = cpu_placement(loaded)
        self.collector = self.collecting()

    def collecting(self, **changes: Any) -> Collector:
        placement = replace(self.placement, **changes)
        return Collector(
            self.loaded.config, self.environments, self.lab.builder, placement, self.display
        )

    def collect(self, step: int = 1) -> tuple[list[Rollout], dict[str, float]]:
        return self.collector.collect(self.engine, step, step - 1)

    def evaluator(self) -> Evaluator:
        prompts = {
            name: [self.lab.builder.build(name, task) for task in env.eval]
            for name, env in self.environments.items()
        }
        return Evaluator(
            self.loaded.config,
            self.environments,
            prompts,
            self.lab.builder,
            self.engine,
            self.display,
            self.placement.max_length,
        )


def conversation_ids(rollout: Rollout) -> list[int]:
    """The student's whole sequence, joined as the docstrings say, and not by the code's own."""
    ids, left = [*rollout.prompt.student_ids], list(rollout.completion.token_ids)
    taken = 0
    for inserted in rollout.completion.inserted:
        ids += left[taken : inserted.at]
        ids += inserted.ids
        taken = inserted.at
    return ids + left[taken:]
