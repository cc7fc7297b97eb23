"""Checks of what engines return: the numbers of tokens, and log-probs that are finite.

They are made where results are taken over, whatever the engine. A run must not train on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from minidistill.engines.base import Engine
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Completion, Prompt, SamplingParams, TeacherScores

Name = Callable[[int], str]
"""Says which completion a row is, for messages."""


def named(jobs: Sequence[tuple[Prompt, int]], kind: str = "rollout") -> Name:
    """Names rows by their prompts' tasks, and their numbers among a prompt's samples."""

    def name(row: int) -> str:
        prompt, sample = jobs[row]
        return f"{kind} {row} (task {prompt.task.id} of {prompt.env}, sample {sample})"

    return name


def check_completions(
    engine: Engine,
    completions: Sequence[Completion],
    count: int,
    params: SamplingParams,
    name: Name,
) -> None:
    """Raise UserError (exit code 4) unless there are `count` completions that can be trained on."""
    if len(completions) != count:
        raise _error(engine, f"{len(completions)} completions for {count} requests")
    for row, completion in enumerate(completions):
        check_completion(engine, completion, params, name(row))


def check_completion(
    engine: Engine, completion: Completion, params: SamplingParams, name: str
) -> None:
    """Raise UserError (exit code 4) for a completion that cannot be trained on."""
    tokens = len(completion.token_ids)
    if not 1 <= tokens <= params.max_tokens:
        what = f"{tokens} tokens for {name}, instead of 1 to {params.max_tokens}"
        raise _error(engine, what)
    _check_logprobs(engine, completion.logprobs, tokens, f"sampled log-probs for {name}")
    if params.top_ids:
        shape = () if completion.top_ids is None else completion.top_ids.shape
        if shape != (tokens, params.top_ids):
            what = f"most likely ids of shape {shape} for the {tokens} tokens of {name}"
            raise _error(engine, what)


def check_scores(
    engine: Engine,
    scores: Sequence[TeacherScores],
    completions: Sequence[Sequence[int]],
    name: Name,
) -> None:
    """Raise UserError (exit code 4) unless each completion has finite scores of all its tokens."""
    if len(scores) != len(completions):
        raise _error(engine, f"scores of {len(scores)} completions instead of {len(completions)}")
    for row, (score, ids) in enumerate(zip(scores, completions, strict=True)):
        what = f"scores for {name(row)}"
        _check_logprobs(engine, score.logprobs, len(ids), what)
        if score.top is not None:
            if len(score.top) != len(ids):
                raise _error(engine, f"{len(score.top)} rows of {what} and its {len(ids)} tokens")
            _check_finite(engine, np.ravel(score.top).tolist(), what)


def _check_logprobs(engine: Engine, values: Sequence[float], tokens: int, what: str) -> None:
    if len(values) != tokens:
        raise _error(engine, f"{len(values)} {what} and its {tokens} tokens")
    _check_finite(engine, values, what)


def _check_finite(engine: Engine, values: Iterable[float], what: str) -> None:
    for index, value in enumerate(values):
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise _error(engine, f"{what} with {value} at {index}")


def _error(engine: Engine, what: str) -> UserError:
    return UserError(
        f"the {engine.description} returned {what}",
        where="inference",
        fix="see the engine's log. If log-probs are not finite, lower trainer.optim.lr and start "
        "again, or resume an earlier checkpoint",
        exit_code=EXIT_HEALTH,
    )
