"""Keys and values of sequences that are being decoded: written in place, each prompt once.

transformers' own cache is a new copy of itself after every token, and its SDPA reads a copy that is
widened to all heads. Here a token is written into a buffer, and the heads that read the same keys
are the queries of one product. Where it saves enough, a prompt is stored once for all rows that
continue it, and what all prompts begin with once for all prompts.

Shapes: `_B` rows, `_G` distinct prompts, `_K` heads of keys and values, `_L` tokens, `_D` head
size; `_R` query heads that read the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from minidistill.placement.attention import VARLEN
from minidistill.trainer.attention import PARTIAL, partial_attention
from minidistill.trainer.forward import KeysValues
from minidistill.trainer.policy import Policy

MIN_SAVED = 2048
"""Tokens in all rows. Reading fewer of them again costs less than attention in two parts."""


def decodes_in_place(policy: Policy, cache: Any) -> bool:
    """Whether the current role's model attends through `attend`, to all tokens of its cache."""
    return policy.config._attn_implementation == VARLEN and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


class RowsLayer(DynamicLayer):
    """A layer's keys and values of the rows' own tokens, in buffers (B, K, room, D)."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.buffers = keys, values
        self.rows, self.used = keys.shape[0], used

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each row. Returns views of all of their tokens."""
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.used] = new[:, :, 0]
        self.used += 1
        return self.states()

    def states(self) -> tuple[Tensor, Tensor]:
        keys, values = self.buffers
        return keys[: self.rows, :, : self.used], values[: self.rows, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used

    def move(self, to: Tensor, source: Tensor, rows: int) -> None:
        """Copy rows over those that have left; the first `rows` remain."""
        if len(to):
            for buffer in self.states():
                buffer[to] = buffer[source]
        self.rows = rows


@dataclass(slots=True)
class Shared:
    """Tokens that several rows read: those of their prompt, or what all prompts begin with."""

    states: KeysValues
    """(G, K, L, D) of each layer."""
    mask: Tensor | None
    """0, or -inf at padding; (G, 1, 1, L)."""
    groups: list[int]
    """Of each row, the index of what it reads."""
    rows: Tensor | None = None
    """For each group the rows that read it, as many for all (some repeated). None: in order."""
    slots: Tensor | None = None
    """Where each row is among `rows`."""

    def __post_init__(self) -> None:
        self._arrange()

    def attend(self, layer: int, query_BKRD: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention to these tokens alone, and its log-sum-exps (B, K, R)."""
        keys, values = self.states[layer]
        groups = keys.shape[0]
        chosen = query_BKRD if self.rows is None else query_BKRD[self.rows]
        _, heads, queries, size = chosen.shape
        together = chosen.view(groups, -1, heads, queries, size).transpose(1, 2)
        together = together.reshape(groups, heads, -1, size)
        output, lse = partial_attention(together, keys, values, self.mask, scale)
        output = output.reshape(groups, heads, -1, queries, size).transpose(1, 2).flatten(0, 1)
        lse = lse.reshape(groups, heads, -1, queries).transpose(1, 2).flatten(0, 1)
        return (output, lse) if self.slots is None else (output[self.slots], lse[self.slots])

    def keep(self, order: Sequence[int]) -> None:
        """Keep these rows, in this order. What no row reads makes room in place."""
        self.groups = [self.groups[i] for i in order]
        read = in_place(sorted(set(self.groups)))
        if len(read) < self.states[0][0].shape[0]:
            to, source = _moves(read, self.states[0][0].device)
            for index, (keys, values) in enumerate(self.states):
                if len(to):
                    keys[to], values[to] = keys[source], values[source]
                self.states[index] = keys[: len(read)], values[: len(read)]
            if self.mask is not None:
                self.mask = self.mask[read]
            self.groups = [read.index(group) for group in self.groups]
        self._arrange()

    def _arrange(self) -> None:
        device = self.states[0][0].device
        readers: list[list[int]] = [[] for _ in range(self.states[0][0].shape[0])]
        slots = []
        for row, group in enumerate(self.groups):
            slots.append(len(readers[group]))
            readers[group].append(row)
        most = max(map(len, readers))
        padded = [row for rows in readers for row in (rows + most * rows[:1])[:most]]
        if padded == list(range(len(self.groups))):
            self.rows = self.slots = None
            return
        self.rows = torch.tensor(padded).to(device)
        places = [group * most + slot for group, slot in zip(self.groups, slots, strict=True)]
        self.slots = torch.tensor(places).to(device)


class Decoding:
    """A cache for passes of one token a row, and the attention of these passes.

    `prompts` is the cache of the distinct prompts, whose layers are taken out of it one by one.
    `copies` are the rows of each prompt, `real_GL` is False at their padding (None if there is
    none), `states` are those of the tokens that all begin with, if they are kept, and `room` is the
    number of tokens to come.
    """

    def __init__(
        self,
        prompts: Any,
        copies: Sequence[int],
        real_GL: Tensor | None,
        states: KeysValues | None,
        room: int,
    ) -> None:
        self.cache = prompts
        first = prompts.layers[0].keys
        rows, width, device = sum(copies), first.shape[2], first.device
        prefix = states[0][0].shape[2] if states else 0
        can_share = device.type == "cpu" and PARTIAL is not None
        once = can_share and (rows - len(copies)) * width >= MIN_SAVED
        readers = len(copies) if once else rows
        start = prefix if can_share and (readers - 1) * prefix >= MIN_SAVED else 0
        mask = None
        if real_GL is not None:
            mask = torch.zeros(real_GL.shape, dtype=first.dtype, device=device)
            mask = mask.masked_fill_(~real_GL, float("-inf"))[:, None, None, start:]
        self.shared: list[Shared] = []
        self.mask: Tensor | None = None
        """Of the rows' own tokens, (B, 1, 1, room)."""
        del first
        groups = [group for group, count in enumerate(copies) for _ in range(count)]
        if start:
            assert states is not None
            self.shared.append(Shared(list(states), None, [0] * rows))
        taken: KeysValues = []
        for index, layer in enumerate(prompts.layers):
            pair = layer.keys[:, :, start:], layer.values[:, :, start:]
            if once:
                # a view would keep the prefix, which is stored once already
                taken.append((pair[0].contiguous(), pair[1].contiguous()))
            before = 0 if once else width - start
            keys, values = (_buffer(x, copies, before, room) for x in pair)
            prompts.layers[index] = RowsLayer(keys, values, before)
        if once:
            self.shared.append(Shared(taken, mask, groups))
        elif mask is not None:
            own = mask[torch.tensor(groups).to(device)]
            self.mask = torch.nn.functional.pad(own, (0, room))

    @property
    def longest(self) -> int:
        """Tokens that a row attends to, padding included."""
        before: int = sum(shared.states[0][0].shape[2] for shared in self.shared)
        return before + int(self.cache.layers[0].used)

    def attend(self, layer: int, query: Tensor, scale: float | None) -> Tensor:
        """Attention of one token a row, (B, heads, 1, D), to its sequence: (B, 1, heads, D)."""
        keys, values = self.cache.layers[layer].states()
        rows, heads, _, size = query.shape
        query_BKRD = query.reshape(rows, keys.shape[1], -1, size)
        mask = None if self.mask is None else self.mask[..., : keys.shape[2]]
        if not self.shared:
            output = scaled_dot_product_attention(
                query_BKRD, keys, values, attn_mask=mask, scale=scale
            )
            return output.reshape(rows, 1, heads, size)
        output, lse = partial_attention(query_BKRD, keys, values, mask, scale)
        output = output.float() if output.itemsize < 4 else output
        for index, shared in enumerate(self.shared):
            part, part_lse = shared.attend(layer, query_BKRD, scale)
            weight = torch.sigmoid(part_lse - lse)[..., None]
            output = torch.lerp(output, part.to(output.dtype), weight.to(output.dtype))
            if index + 1 < len(self.shared):
                lse = torch.logaddexp(lse, part_lse)
        return output.to(query.dtype).reshape(rows, 1, heads, size)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keep these rows; returns their order from now on. Only rows that move are copied."""
        order = in_place(rows)
        to, source = _moves(order, self.cache.layers[0].keys.device)
        for layer in self.cache.layers:
            layer.move(to, source, len(order))
        if self.mask is not None:
            self.mask = self.mask[order]
        for shared in self.shared:
            shared.keep(order)
        return order


def in_place(kept: Sequence[int]) -> list[int]:
    """An order of the kept rows that moves the fewest: into the places of dropped ones."""
    stay, movers = set(kept), iter([i for i in kept if i >= len(kept)])
    return [i if i in stay else next(movers) for i in range(len(kept))]


def _moves(order: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to, and where from."""
    moved = [(to, source) for to, source in enumerate(order) if to != source]
    pairs = torch.tensor(moved, dtype=torch.int64).reshape(-1, 2).to(device)
    return pairs[:, 0], pairs[:, 1]


def _buffer(prompts: Tensor, copies: Sequence[int], before: int, room: int) -> Tensor:
    """Room for the tokens of each row, after the first `before` of its prompt."""
    _, heads, _, size = prompts.shape
    buffer = prompts.new_empty(sum(copies), heads, before + room, size)
    if before:
        row = 0
        for prompt, count in zip(prompts, copies, strict=True):
            buffer[row : row + count, :, :before] = prompt
            row += count
    return buffer
