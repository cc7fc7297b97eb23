"""Forward passes that keep only what the head needs: hidden states at completion positions.

Shapes: `_B` sequences, `_L` length, `_N` completion tokens, `_H` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minidistill.models.auto import keeps_tokens
from minidistill.placement.attention import FLASH
from minidistill.placement.limits import head_size
from minidistill.trainer.attention import (
    GatheredKeys,
    blocks,
    gathered_arguments,
    kernel_runs,
    key_index,
)
from minidistill.trainer.batching import Tokens
from minidistill.trainer.policy import Policy
from minidistill.trainer.shared_row import MIN_SHARED, Segment, common_prefix
from minidistill.types import Role

KeysValues = list[tuple[Tensor, Tensor]]
MIN_SAVED = 512
"""Below this many tokens, a pass of its own for some prompts costs more than it saves."""


class PrefixCache:
    """Keys and values of the prefixes that prompts share.

    The teacher's context is the same for every rollout, and a frozen teacher's weights never
    change, so its context is read once a run. The most recent prefixes are kept.
    """

    def __init__(
        self,
        policy: Policy,
        shares: bool,
        contexts: Sequence[tuple[int, ...]] = (),
        size: int = 4,
    ) -> None:
        """`contexts` are what the run's teacher prompts are known to begin with."""
        self.policy, self.shares, self.size = policy, shares, size
        self.contexts = contexts
        self._kept: dict[tuple[int, ...], KeysValues] = {}
        self.computed = 0

    def common(self, prompts: Sequence[Sequence[int]], role: Role) -> tuple[int, ...]:
        """The ids that all prompts begin with; () if caching them does not pay off.

        For weights that never change it is a known context, if all prompts begin with one. One
        prompt alone does not show where its context ends, and some may share more by chance.
        """
        distinct = set(map(tuple, prompts)) if self.shares else set()
        if distinct and self._frozen(role):
            for context in self._beginnings(next(iter(distinct))):
                size = len(context)
                if all(len(ids) > size and ids[:size] == context for ids in distinct):
                    return context
        prefix = common_prefix([*distinct]) if len(distinct) > 1 else ()
        return prefix if len(prefix) >= MIN_SHARED else ()

    def groups(
        self, prompts: Sequence[tuple[int, ...]], common: tuple[int, ...], role: Role
    ) -> list[tuple[tuple[int, ...], list[int]]]:
        """Prompts by what they begin with, and the rows of each group, in order.

        All begin with `common`. Those with a longer known context have a group of their own, if
        that saves more tokens than a pass of its own costs. It depends on these prompts alone.
        """
        known: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(prompts):
            known.setdefault(next(self._beginnings(ids), common), []).append(row)
        groups: dict[tuple[int, ...], list[int]] = {}
        for context, rows in known.items():
            saved = (len(context) - len(common)) * len({prompts[row] for row in rows})
            own = self.shares and self._frozen(role) and saved >= MIN_SAVED
            groups.setdefault(context if own else common, []).extend(rows)
        return [(prefix, sorted(rows)) for prefix, rows in groups.items()]

    def states(self, prefix: tuple[int, ...], role: Role) -> KeysValues | None:
        """Keys and values of the prefix; None for (). `role` must be the current role."""
        if not prefix:
            return None
        if not self._frozen(role):
            return prefix_states(self.policy, prefix)
        if prefix not in self._kept:
            self._kept[prefix] = prefix_states(self.policy, prefix)
            self.computed += 1
            while len(self._kept) > self.size:
                del self._kept[next(iter(self._kept))]
        return self._kept[prefix]

    @property
    def contexts(self) -> Sequence[tuple[int, ...]]:
        return [context for of_length in self._contexts.values() for context in of_length]

    @contexts.setter
    def contexts(self, contexts: Sequence[tuple[int, ...]]) -> None:
        by_length: dict[int, set[tuple[int, ...]]] = {}
        for context in sorted(contexts, key=len, reverse=True):
            if len(context) >= MIN_SHARED:
                by_length.setdefault(len(context), set()).add(context)
        self._contexts = by_length

    def _beginnings(self, ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The known contexts that ids begin with and are longer than, the longest first."""
        for length, contexts in self._contexts.items():  # so that thousands of them cost little
            if len(ids) > length and (begin := tuple(ids[:length])) in contexts:
                yield begin

    def _frozen(self, role: Role) -> bool:
        policy = self.policy
        return policy.weights_of(role) is policy.teacher_weights and policy.frozen_teacher


@torch.no_grad()
def prefix_states(policy: Policy, prefix: Sequence[int]) -> KeysValues:
    """(keys, values) a layer, each (1, heads, len(prefix), head size), under the current role."""
    cache = new_cache(policy)
    ids = torch.tensor([list(prefix)], device=policy.device)
    policy.body(input_ids=ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def new_cache(policy: Policy) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=policy.config)


def can_share_prefix(policy: Policy) -> bool:
    """Whether every layer's cache only grows: no sliding window, no recurrent state."""
    from transformers.cache_utils import DynamicLayer

    layers = new_cache(policy).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def select_rows(cache: Any, index: Tensor) -> None:
    """Keep these rows of a cache, in place; a row may be taken several times."""
    for layer in cache.layers:
        if keeps_tokens(layer):
            layer.batch_select_indices(index)
        else:  # `batch_select_indices` leaves recurrent states out, if a layer has it at all
            layer.reorder_cache(index)


def seeded_cache(policy: Policy, states: KeysValues | None, rows: int) -> Any:
    """A cache that begins with `states` for each of `rows` sequences (expanded, not copied)."""
    cache = new_cache(policy)
    if states is None:
        return cache
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys = keys.expand(rows, -1, -1, -1)
        layer.values = values.expand(rows, -1, -1, -1)
    return cache


def hidden_states(policy: Policy, tokens: Tokens, states: KeysValues | None = None) -> Tensor:
    """Hidden states that predict each completion token, (N, H), under the current role.

    `states` are the keys and values of `tokens.prefix`.
    """
    tokens = tokens.to(policy.device)
    prefix, segments = len(tokens.prefix), tokens.segments
    assert not prefix or states is not None, "tokens without their prefix's states"
    if segments and _gathers_keys(policy):
        cache = _gathering_cache(policy, states if prefix else None, segments)
        row: dict[str, Any] = gathered_arguments(segments, prefix, policy.device)
    else:
        assert tokens.mask_BL is not None or segments or not prefix, "the sequences share a prefix"
        cache = seeded_cache(policy, states, tokens.ids_BL.shape[0]) if prefix else None
        row = {"row_blocks": blocks(segments, prefix, policy.device)} if segments else {}
    hidden_BLH = policy.body(
        input_ids=tokens.ids_BL,
        attention_mask=tokens.mask_BL,
        position_ids=tokens.positions_BL,
        past_key_values=cache,
        use_cache=cache is not None,
        **row,
    ).last_hidden_state
    return hidden_BLH[tokens.rows_N, tokens.columns_N]


def _gathers_keys(policy: Policy) -> bool:
    """Whether a kernel attends to the segments of a row, each to keys of its own."""
    if policy.attention.implementation == FLASH:
        return True
    size = head_size(policy.config.get_text_config())
    return kernel_runs(policy.device, policy.dtype, size)


def _gathering_cache(policy: Policy, states: KeysValues | None, segments: Sequence[Segment]) -> Any:
    cache = new_cache(policy)
    index_T = key_index(segments, states[0][0].shape[2] if states else 0, policy.device)
    prefixes = states if states is not None else [None] * len(cache.layers)
    cache.layers = [GatheredKeys(prefix, index_T) for prefix in prefixes]
    return cache
