"""The KL of completions between two roles or two views of the prompt, outside training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidistill.placement.attention import Layout
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import KeysValues, PrefixCache, hidden_states
from minidistill.trainer.policy import Policy
from minidistill.trainer.token_budget import TokenBudget
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
    budget: TokenBudget,
    doing: str,
    predicted: Sequence[Sequence[int]] | None = None,
    prefixes: PrefixCache | None = None,
) -> Tensor:
    """KL(p‖q) in nats of each completion token, (N,) fp32, in the order of `completions`.

    `predicted` has the places of the tokens that count, as for `collate`. p reads `prompts[0]`
    under `roles[0]`, q reads `prompts[1]` under `roles[1]`. `budget` bounds the padded tokens of
    one pass. Raises UserError (exit code 3) if one sequence does not fit in memory; `doing` says in
    it what the KL is for. What all prompts of a view begin with is read once with `prefixes`, and
    for a frozen teacher once a run: the KL is the same up to float error.
    """
    shared = [
        () if prefixes is None else prefixes.common(view, role)
        for view, role in zip(prompts, roles, strict=True)
    ]
    longest = [
        max(len(first) - len(shared[0]), len(second) - len(shared[1])) + len(completion)
        for first, second, completion in zip(*prompts, completions, strict=True)
    ]
    layout = policy.attention.prefix_layout
    if predicted is None:
        predicted = [range(len(completion)) for completion in completions]

    def run_batch(rows: list[int]) -> Sequence[Tensor]:
        hidden, heads = [], []
        batch, places = [completions[i] for i in rows], [predicted[i] for i in rows]
        for view, role, prefix, known in zip(prompts, roles, shared, states, strict=True):
            tokens = collate(
                [view[i] for i in rows],
                batch,
                pad_id=policy.pad_id,
                layout=layout,
                predicted=places,
                prefix=prefix,
            )
            with policy.running_as(role):
                hidden.append(hidden_states(policy, tokens, known))
                heads.append(policy.head)
        one_head = heads[1].weight_VH is heads[0].weight_VH
        kl_N = linear_reverse_kl(
            hidden[0],
            hidden[1],
            heads[0],
            None if one_head else heads[1],
            temperature=temperature,
        )
        return kl_N.cpu().split([len(each) for each in places])

    with policy.unsharded(*roles), policy.inference():
        states: list[KeysValues | None] = []
        for role, prefix in zip(roles, shared, strict=True):
            with policy.running_as(role):
                states.append(prefixes.states(prefix, role) if prefixes is not None else None)
        return torch.cat(budget.run(longest, run_batch, doing, packed=layout is Layout.SHARED))
