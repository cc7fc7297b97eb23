"""From rollouts to micro-batches: padded or packed, within a token budget.

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

    `ids_BL` and `positions_BL` are int64. So is `mask_BL`, which is None if sequences are packed in
    one row. `rows_N` and `columns_N` locate the hidden state that predicts each completion token.
    `targets_N` has those tokens, sequence by sequence.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    mask_BL: Tensor | None
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor
    prefix: tuple[int, ...] = ()
    """Ids that every sequence begins with and that `ids_BL` leaves out (a cached context)."""
    lengths: tuple[int, ...] = ()
    """Of the sequences in a packed row, without the prefix. Empty for padded sequences."""

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
            self.lengths,
        )


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    packed: bool = False,
    prefix: Sequence[int] = (),
) -> Tokens:
    """Join each prompt with its completion. Every prompt must begin with `prefix` and be longer."""
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
        region = (0 if packed else row, slice(starts[row], starts[row] + lengths[row]))
        ids_BL[region] = torch.tensor([*prompt, *completion])
        positions_BL[region] = torch.arange(len(prefix), len(prefix) + lengths[row])
        if mask_BL is not None:
            mask_BL[region] = 1
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
        tuple(lengths) if packed else (),
    )


def split_by_tokens(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Indices in groups, each of which has at most `budget` padded (or packed) tokens.

    Longest first, so that there is little padding. A sequence over the budget has its own group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    total = 0
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if packed:
            tokens = total + lengths[index]
        else:
            tokens = longest * (len(groups[-1]) + 1 if groups else 1)
        if groups and tokens <= budget:
            groups[-1].append(index)
            total += lengths[index]
        else:
            groups.append([index])
            total = lengths[index]
    return groups


def share_out(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, in order, with about equal sums of lengths.

    Longest first, each to the rank with the least so far.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that all sequences begin with. At least one id of each sequence is left over."""
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    limit = min(map(len, sequences)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    return tuple(low[:length])
