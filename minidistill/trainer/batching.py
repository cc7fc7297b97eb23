"""From rollouts to micro-batches: padded or packed, within a budget of tokens.

Shapes: `_B` sequences, `_L` length, `_N` completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompts with their completions, ready for a forward pass.

    `ids_BL`, `positions_BL` int64; `mask_BL` int64, None where sequences are packed in one row and
    told apart by their positions. `rows_N`, `columns_N` are where the hidden state that predicts
    each completion token stands, `targets_N` that token, sequence by sequence.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    mask_BL: Tensor | None
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor
    prefix: tuple[int, ...] = ()
    """Ids that every sequence begins with and that `ids_BL` leaves out (a cached context)."""

    def to(self, device: torch.device) -> Tokens:
        if device.type == "cpu":
            return self
        return Tokens(
            self.ids_BL.to(device),
            self.positions_BL.to(device),
            None if self.mask_BL is None else self.mask_BL.to(device),
            self.rows_N.to(device),
            self.columns_N.to(device),
            self.targets_N.to(device),
            self.prefix,
        )


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool = False,
    prefix: Sequence[int] = (),
) -> Tokens:
    """Join each prompt with its completion. `prefix` must begin every prompt, shorter than any."""
    prompts = [prompt[len(prefix) :] for prompt in prompts]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    starts, columns, rows, targets = [], [], [], []
    offset = 0
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        starts.append(offset)
        first = offset + len(prompt) - 1
        columns.append(torch.arange(first, first + len(completion)))
        rows.append(torch.full((len(completion),), 0 if packed else row))
        targets.append(torch.tensor(completion, dtype=torch.int64))
        offset += lengths[row] if packed else 0
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    ids_BL = torch.full(shape, pad_id)
    positions_BL = torch.zeros(shape, dtype=torch.int64)
    mask_BL = None if packed else torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = (0 if packed else row, slice(starts[row], starts[row] + lengths[row]))
        ids_BL[place] = torch.tensor([*prompt, *completion])
        positions_BL[place] = torch.arange(len(prefix), len(prefix) + lengths[row])
        if mask_BL is not None:
            mask_BL[place] = 1
    if prefix and mask_BL is not None:
        mask_BL = torch.cat([mask_BL.new_ones(len(lengths), len(prefix)), mask_BL], dim=1)
    return Tokens(
        ids_BL,
        positions_BL,
        mask_BL,
        torch.cat(rows),
        torch.cat(columns),
        torch.cat(targets),
        tuple(prefix),
    )


def split_by_tokens(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Indices grouped so that a group's padded (or packed) tokens stay within `budget`.

    Longest first, so that padding is small; a sequence over the budget stands alone. Every index
    appears once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    total = 0
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        grown = (
            total + lengths[index] if packed else longest * (len(groups[-1]) + 1 if groups else 1)
        )
        if groups and grown <= budget:
            groups[-1].append(index)
            total += lengths[index]
        else:
            groups.append([index])
            total = lengths[index]
    return groups


def share_out(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, in order, so that their sums of lengths are about equal.

    The longest first, each to the rank that has the least yet.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that all sequences begin with, leaving each at least one id of its own."""
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    limit = min(map(len, sequences)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    return tuple(low[:length])
