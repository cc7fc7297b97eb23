"""The teacher's passes over a micro-batch, if it runs in the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minidistill.trainer.batching import Tokens, collate
from minidistill.trainer.forward import KeysValues, PrefixCache
from minidistill.trainer.policy import Policy
from minidistill.types import Role, Rollout

TeacherContext = tuple[tuple[int, ...], KeysValues | None]
"""The ids that all of a step's teacher prompts begin with, and their keys and values."""


def teacher_passes(
    policy: Policy, prefixes: PrefixCache, rollouts: Sequence[Rollout], context: TeacherContext
) -> Iterator[tuple[list[int], Tokens, KeysValues | None]]:
    """Each pass: its rollouts by their index, their tokens, and what is cached of their prefix.

    Rollouts with different contexts may be in passes of their own: see `PrefixCache.groups`. The
    teacher must be the current role.
    """
    common, states = context
    prompts = [r.prompt.teacher_ids for r in rollouts]
    groups = [(common, [*range(len(rollouts))])]
    if policy.sharded is None:  # sharded ranks run the same number of passes
        groups = prefixes.groups(prompts, common, Role.TEACHER)
    for prefix, rows in groups:
        tokens = collate(
            [prompts[i] for i in rows],
            [rollouts[i].completion.sequence for i in rows],
            predicted=[rollouts[i].completion.sampled_at for i in rows],
            pad_id=policy.pad_id,
            layout=policy.attention.prefix_layout,
            prefix=prefix,
        )
        own = states if prefix == common else prefixes.states(prefix, Role.TEACHER)
        yield rows, tokens, own


def in_order(passes: Sequence[tuple[list[int], Tensor]], rollouts: Sequence[Rollout]) -> Tensor:
    """The hidden states of all passes, (N, H), rollout by rollout."""
    if len(passes) == 1:
        return passes[0][1]
    by_rollout: list[Tensor] = [torch.empty(0)] * len(rollouts)
    for rows, hidden_NH in passes:
        parts = hidden_NH.split([len(rollouts[i].completion.token_ids) for i in rows])
        for row, part in zip(rows, parts, strict=True):
            by_rollout[row] = part
    return torch.cat(by_rollout)
