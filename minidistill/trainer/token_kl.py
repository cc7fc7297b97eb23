"""The KL of completions between two roles or two views of the prompt, outside training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidistill.trainer.batching import collate, split_by_tokens
from minidistill.trainer.forward import hidden_states
from minidistill.trainer.policy import Policy
from minidistill.types import Role
from minidistill_kernels import linear_reverse_kl


@torch.no_grad()
def token_kl(
    policy: Policy,
    completions: Sequence[Sequence[int]],
    *,
    prompts: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    roles: tuple[Role, Role],
    temperature: float,
    budget: int,
) -> Tensor:
    """KL(p‖q) in nats of each completion token, (N,) fp32, in the order of `completions`.

    p reads `prompts[0]` under `roles[0]`, q reads `prompts[1]` under `roles[1]`. `budget` bounds
    the padded tokens of one pass.
    """
    longest = [
        max(len(first), len(second)) + len(completion)
        for first, second, completion in zip(*prompts, completions, strict=True)
    ]
    by_completion: dict[int, Tensor] = {}
    packed = policy.attention.unpadded
    with policy.unsharded(*roles), policy.inference():
        for rows in split_by_tokens(longest, budget, packed):
            hidden, heads = [], []
            batch = [completions[i] for i in rows]
            for view, role in zip(prompts, roles, strict=True):
                tokens = collate(
                    [view[i] for i in rows], batch, pad_id=policy.pad_id, packed=packed
                )
                with policy.running_as(role):
                    hidden.append(hidden_states(policy, tokens))
                    heads.append(policy.head_VH)
            second_head_VH = None if heads[1] is heads[0] else heads[1]
            kl_N = linear_reverse_kl(
                hidden[0], hidden[1], heads[0].detach(), second_head_VH, temperature=temperature
            )
            parts = kl_N.cpu().split([len(c) for c in batch])
            by_completion.update(zip(rows, parts, strict=True))
    return torch.cat([by_completion[i] for i in range(len(completions))])
