"""A finished run's student and teacher, and their distributions at each token.

Shapes: `_N` tokens, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidistill.envs.registry import load_environments
from minidistill.evaluation.evaluator import HELD_OUT
from minidistill.evaluation.kl import sample
from minidistill.export.source import open_source
from minidistill.look.model import Model, load
from minidistill.tasks.contexts import Contexts
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import hidden_states
from minidistill.types import Completion, Prompt, Role

ROWS = 32  # sequences in a pass


def loaded(run: Path) -> Model:
    return load(open_source(str(run)))


def both_views(model: Model, count: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Log-probs of the student and of the teacher in context, each (N, V) fp64 at temperature 1, at
    every token of the student's answers to held-out prompts."""
    prompts = held_out(model, count)
    view = [prompt.student_ids for prompt in prompts]
    longest = model.config.orchestrator.sampling.max_tokens
    answers = sample(model.config, model.engine, view, "measure", Role.STUDENT, longest)
    return (
        logprobs(model, view, answers, Role.STUDENT),
        logprobs(model, [prompt.teacher_ids for prompt in prompts], answers, Role.TEACHER),
    )


def held_out(model: Model, count: int) -> list[Prompt]:
    """The first held-out prompts of the run's first environment."""
    config, builder = model.config, model.builder
    first = config.orchestrator.env[:1]
    environments = load_environments(first, "orchestrator.env")
    builder.contexts = Contexts.of(config, environments, {})
    name = first[0].name
    return [builder.build(name, task) for task in environments[name].eval[:count]]


@torch.no_grad()
def logprobs(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Completion], role: Role
) -> Tensor:
    """(N, V) fp64, in the order of the answers."""
    policy = model.policy
    parts = []
    with policy.running_as(role), policy.inference():
        for start in range(0, len(prompts), ROWS):
            rows = slice(start, start + ROWS)
            completions = [answer.token_ids for answer in answers[rows]]
            tokens = collate(
                prompts[rows], completions, pad_id=policy.pad_id,
                layout=policy.attention.prefix_layout,
            )  # fmt: skip
            logits_NV = policy.logits(hidden_states(policy, tokens))
            parts.append(logits_NV.double().log_softmax(-1))
    return torch.cat(parts)
