"""Log-probs and a step's loss from plain forward passes of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill.types import Rollout
from support.objective_reference import objective


def completion_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """The logits that predict each token of the completion, (N, V)."""
    ids_BL = torch.tensor([[*prompt, *completion]], device=model.device)
    return model(input_ids=ids_BL).logits[0, len(prompt) - 1 : -1].cpu()


@torch.no_grad()
def completion_logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """The log-prob of each token of the completion, (N,)."""
    logits_NV = completion_logits(model, prompt, completion) / temperature
    return logits_NV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def step_loss(
    rollouts: Sequence[Rollout],
    student: Any,
    teacher_logits: Callable[[Sequence[int], Sequence[int]], Tensor],
    **options: Any,
) -> Tensor:
    """The loss of a training step, one rollout at a time. `options` go to `objective`."""
    tokens, loss = sum(len(r.completion.token_ids) for r in rollouts), torch.zeros(())
    for rollout in rollouts:
        completion = rollout.completion.token_ids
        with torch.no_grad():
            teacher_NV = teacher_logits(rollout.prompt.teacher_ids, completion)
        result = objective(
            completion_logits(student, rollout.prompt.student_ids, completion),
            teacher_NV,
            torch.tensor(completion),
            advantage_N=torch.full((len(completion),), rollout.advantage),
            sampler_logp_N=torch.tensor(rollout.completion.logprobs),
            **options,
        )
        assert not result.masked.any()
        loss = loss + result.loss.sum() / tokens
    return loss
