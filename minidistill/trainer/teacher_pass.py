"""The teacher's pass over a micro-batch, if it runs in the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidistill.trainer.batching import Tokens, collate
from minidistill.trainer.forward import KeysValues, PrefixCache, hidden_states
from minidistill.trainer.policy import Policy
from minidistill.types import Role, Rollout

TeacherContext = tuple[tuple[int, ...], KeysValues | None]
"""The ids that all of a step's teacher prompts begin with, and their keys and values."""


def teacher_states(
    policy: Policy,
    prefixes: PrefixCache,
    rollouts: Sequence[Rollout],
    context: TeacherContext,
    count: Callable[[Tokens], None],
) -> Tensor:
    """Hidden states that predict each completion token, (N, H), rollout by rollout.

    Rollouts with different contexts may be in passes of their own, each after its context's cached
    keys and values: see `PrefixCache.groups`. `count` is called with the tokens of each pass. The
    teacher must be the current role.
    """
    common, states = context
    prompts = [r.prompt.teacher_ids for r in rollouts]
    completions = [r.completion.token_ids for r in rollouts]
    groups = [(common, [*range(len(rollouts))])]
    if policy.sharded is None:  # sharded ranks run the same number of passes
        groups = prefixes.groups(prompts, common, Role.TEACHER)
    by_rollout: list[Tensor] = [torch.empty(0)] * len(rollouts)
    for prefix, rows in groups:
        tokens = collate(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            pad_id=policy.pad_id,
            layout=policy.attention.prefix_layout,
            prefix=prefix,
        )
        count(tokens)
        own = states if prefix == common else prefixes.states(prefix, Role.TEACHER)
        hidden_NH = hidden_states(policy, tokens, own)
        if len(groups) == 1:
            return hidden_NH
        parts = hidden_NH.split([len(completions[i]) for i in rows])
        for row, part in zip(rows, parts, strict=True):
            by_rollout[row] = part
    return torch.cat(by_rollout)
