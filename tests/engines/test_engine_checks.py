"""Engines that return too much, too little, or what is no number stop the run at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import cpu_placement, make_lab
from support.scripted import ScriptedEngine

from minidistill.engines.checks import check_completion, check_scores
from minidistill.envs.registry import load_environments
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.evaluation.evaluator import Evaluator
from minidistill.evaluation.kl import teacher_kl
from minidistill.reporting.terminal import open_display
from minidistill.rollouts.collector import Collector
from minidistill.rollouts.stream_collector import StreamCollector
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Completion, Role, SamplingParams, TeacherScores

STEP = (
    "--orchestrator.batch_size", "6", "--orchestrator.env.0.args.num_train_examples", "4",
    "--orchestrator.rollouts_per_example", "3",
)  # fmt: skip
ROW = 4  # the completion that is spoiled: the second sample of the second prompt


def spoil_logprob(value: Any) -> Callable[[Completion], Completion]:
    def spoil(c: Completion) -> Completion:
        return replace(c, logprobs=(*c.logprobs[:-1], value))

    return spoil


SPOILED: dict[str, tuple[Callable[[Completion], Completion], str]] = {
    "nan": (spoil_logprob(math.nan), "with nan at"),
    "minus infinity": (spoil_logprob(-math.inf), "with -inf at"),
    "null": (spoil_logprob(None), "with None at"),
    "a log-prob too few": (lambda c: replace(c, logprobs=c.logprobs[1:]), "tokens"),
    "a token too few": (lambda c: replace(c, token_ids=c.token_ids[1:]), "tokens"),
    "no token": (lambda c: replace(c, token_ids=(), logprobs=()), "0 tokens for"),
    "too long": (
        lambda c: replace(c, token_ids=(1,) * 9999, logprobs=(0.0,) * 9999),
        "9999 tokens for",
    ),
}


class Spoiling(ScriptedEngine):
    """Samples with another engine, and spoils one completion, or all scores."""

    description = "scripted engine in a thread"
    ends_in_order = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.spoil: Callable[[Completion], Completion] = lambda completion: completion
        self.spoil_scores: Callable[[list[list[float]]], Any] = lambda scores: scores

    def generate(self, requests: Any, params: Any, role: Any, *rest: Any) -> list[Completion]:
        sampled = self.engine.generate(requests, params, role)
        sampled[ROW] = self.spoil(sampled[ROW])
        self.known[tuple(requests)] = sampled
        return super().generate(requests, params, role, *rest)

    def score(self, *args: Any) -> list[list[float]]:
        return self.spoil_scores(super().score(*args))  # type: ignore[no-any-return]


class Parts:
    """The parts of a run that take over what an engine returns."""

    def __init__(self, loaded: Any) -> None:
        self.loaded, self.lab = loaded, make_lab(loaded)
        self.engine = Spoiling(self.lab.engine)
        environments = load_environments(loaded.config.orchestrator.env, "")
        builder, display = self.lab.builder, open_display()
        placement = cpu_placement(loaded)
        self.collector = Collector(loaded.config, environments, builder, placement, display)
        prompts = [
            builder.build(name, task) for name, env in environments.items() for task in env.eval[:8]
        ]
        by_env = {prompts[0].env: prompts}
        self.prompts = prompts
        self.evaluator = Evaluator(
            loaded.config, environments, by_env, builder, self.engine, display, placement.max_length
        )

    def collect(self) -> None:
        self.collector.collect(self.engine, 1, 0)

    def stream(self) -> None:
        streams = StreamCollector(self.collector, self.engine, least_tokens=200)
        try:
            list(streams.start(1, 0).rollouts.parts)
        finally:
            self.engine.close()
            streams.close()

    def evaluate(self) -> None:
        self.evaluator.run("student", Role.STUDENT, context=False)

    def measure(self) -> None:
        config, policy = self.loaded.config, self.lab.policy
        teacher_kl(config, policy, self.engine, self.prompts, TokenBudget())


@pytest.fixture(scope="module")
def parts() -> Parts:
    from support.paths import SOKOBAN

    from minidistill.config import load_config

    return Parts(load_config([SOKOBAN, *STEP]))


@pytest.mark.parametrize("fault", SPOILED)
@pytest.mark.parametrize("use", ["collect", "stream", "evaluate", "measure"])
def test_a_completion_that_cannot_be_used_names_its_engine_and_rollout(
    parts: Parts, use: str, fault: str
) -> None:
    parts.engine.spoil, says = SPOILED[fault]
    with pytest.raises(UserError) as caught:
        getattr(parts, use)()
    parts.engine.spoil = lambda completion: completion
    error = caught.value
    assert error.exit_code == EXIT_HEALTH
    assert error.what.startswith("the scripted engine in a thread returned ")
    assert says in error.what
    if use in ("collect", "stream"):
        assert "rollout 4 (task train/" in error.what
        assert "of sokoban-env, sample 1)" in error.what


def test_good_completions_pass(parts: Parts) -> None:
    parts.engine.spoil = lambda completion: completion
    for use in (parts.collect, parts.stream, parts.evaluate, parts.measure):
        use()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda scores: [[math.nan] * len(row) for row in scores], "with nan at 0"),
        (lambda scores: scores[1:], "scores of 5 completions instead of 6"),
        (lambda scores: [row[1:] for row in scores], "tokens"),
    ],
)
def test_scores_that_cannot_be_used(parts: Parts, spoil: Any, says: str) -> None:
    rollouts, _ = parts.collector.collect(parts.engine, 1, 0)
    parts.engine.spoil_scores = spoil
    with pytest.raises(UserError, match=says) as caught:
        parts.collector.score_with_teacher(parts.engine, rollouts)
    parts.engine.spoil_scores = lambda scores: scores
    assert caught.value.exit_code == EXIT_HEALTH
    assert "the scripted engine in a thread returned" in caught.value.what


@pytest.mark.parametrize("top", [np.array([[0.0, math.nan]]), np.zeros((2, 2))])
def test_scores_of_the_most_likely_ids(parts: Parts, top: Any) -> None:
    scores = [TeacherScores([0.0], top)]
    with pytest.raises(UserError, match="scripted"):
        check_scores(parts.engine, scores, [(1,)], lambda row: "rollout 0")


@pytest.mark.parametrize("ids", [None, np.zeros((1, 1)), np.zeros((2, 2))])
def test_most_likely_ids_of_another_shape(parts: Parts, ids: Any) -> None:
    completion = Completion((1,), (0.0,), "eos", ids)
    with pytest.raises(UserError, match="most likely ids of shape"):
        check_completion(parts.engine, completion, SamplingParams(4, top_ids=2), "rollout 0")


def test_the_embedded_engine_names_the_rollout_whose_logits_are_not_finite(parts: Parts) -> None:
    drawn = parts.collector.draw(1)
    head = type(parts.lab.policy.head)
    original = head.mapped

    def mapped(self: Any, logits_BV: torch.Tensor) -> torch.Tensor:
        out = original(self, logits_BV).clone()
        out[-1] = math.nan  # of the batch, whose rows are in the order of the requests
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "mapped", mapped)
        with pytest.raises(UserError, match=r"not finite, at rollout 5 in the embedded") as caught:
            parts.lab.engine.generate(drawn.requests, drawn.params, Role.STUDENT)
    assert caught.value.exit_code == EXIT_HEALTH
