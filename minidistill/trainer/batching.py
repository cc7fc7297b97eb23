"""From rollouts to micro-batches: padded or packed, within a token budget.

Shapes: `_B` sequences, `_L` length, `_N` completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from minidistill.placement.attention import Layout
from minidistill.trainer.shared_row import Segment, shared_row


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
    segments: tuple[Segment, ...] = ()
    """Of a row in which prompts are shared; empty for others."""

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
            self.segments,
        )


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    layout: Layout = Layout.PADDED,
    prefix: Sequence[int] = (),
    predicted: Sequence[Sequence[int]] | None = None,
) -> Tokens:
    """Join each prompt with its completion. Every prompt must begin with `prefix` and be longer.

    `predicted` has the places in each completion whose tokens are predicted, in ascending order; by
    default all. The last token must be.
    """
    if predicted is None:
        predicted = [range(len(completion)) for completion in completions]
    own = [tuple(prompt[len(prefix) :]) for prompt in prompts]
    if layout is Layout.SHARED:
        return _share(own, completions, predicted, tuple(prefix))
    packed = layout is Layout.PACKED
    lengths = [len(p) + len(c) for p, c in zip(own, completions, strict=True)]
    starts, columns, rows = [], [], []
    offset = 0
    for row, (prompt, places) in enumerate(zip(own, predicted, strict=True)):
        starts.append(offset)
        first = offset + len(prompt) - 1
        columns.append(first + torch.tensor([*places], dtype=torch.int64))
        rows.append(torch.full((len(places),), 0 if packed else row))
        offset += lengths[row] if packed else 0
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    ids_BL = torch.full(shape, pad_id)
    positions_BL = torch.zeros(shape, dtype=torch.int64)
    mask_BL = None if packed else torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(zip(own, completions, strict=True)):
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
        _targets(completions, predicted),
        tuple(prefix),
    )


def _share(
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Sequence[int]],
    predicted: Sequence[Sequence[int]],
    prefix: tuple[int, ...],
) -> Tokens:
    row, columns = shared_row(prompts, completions, len(prefix))
    chosen = [each[i] for each, places in zip(columns, predicted, strict=True) for i in places]
    columns_N = torch.tensor(chosen)
    return Tokens(
        torch.tensor([row.ids]),
        torch.tensor([row.positions]),
        None,
        torch.zeros_like(columns_N),
        columns_N,
        _targets(completions, predicted),
        prefix,
        tuple(row.segments),
    )


def _targets(completions: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]]) -> Tensor:
    pairs = zip(completions, predicted, strict=True)
    return torch.tensor([completion[i] for completion, places in pairs for i in places])


def split_by_tokens(
    lengths: Sequence[int], budget: int, packed: bool = False, most_padding: float = 1.0
) -> list[list[int]]:
    """Indices in groups, each of which has at most `budget` padded (or packed) tokens.

    Padded ones longest first, so that there is little padding, and no more than the share
    `most_padding` of a group; packed ones in order, so that equal prompts stay together. A sequence
    over the budget has its own group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (0 if packed else -lengths[i], i))
    groups: list[list[int]] = []
    total = 0
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        unpadded = total + lengths[index]
        tokens = unpadded if packed else longest * (len(groups[-1]) + 1 if groups else 1)
        if groups and tokens <= budget and unpadded >= (1 - most_padding) * tokens:
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


@dataclass(frozen=True, slots=True)
class RowPart:
    """What a rollout adds to a row that has each prompt once."""

    group: Hashable
    """Equal for rollouts of the same prompt."""
    prompt: int
    """Tokens of the prompt, which the first rollout of a group adds."""
    completion: int


def share_out_groups(parts: Sequence[RowPart], ranks: int) -> list[list[int]]:
    """Indices for each rank, with about equal numbers of tokens and few divided groups."""
    members = Counter(part.group for part in parts)
    first: dict[Hashable, int] = {}
    for index, part in enumerate(parts):
        first.setdefault(part.group, index)
    order = sorted(range(len(parts)), key=lambda i: first[parts[i].group])
    costs = [parts[i].completion + parts[i].prompt / members[parts[i].group] for i in order]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index, cost, end in zip(order, costs, accumulate(costs), strict=True):
        shares[int((end - cost / 2) * ranks / sum(costs))].append(index)
    return shares


def split_groups(parts: Sequence[RowPart], budget: int) -> list[list[int]]:
    """Indices in order, in rows of at most `budget` tokens. One over the budget has its own row."""
    rows: list[list[int]] = []
    tokens, group = 0, None
    for index, part in enumerate(parts):
        more = part.completion + (part.prompt if not rows or part.group != group else 0)
        if rows and tokens + more <= budget:
            rows[-1].append(index)
            tokens += more
        else:
            rows.append([index])
            tokens = part.prompt + part.completion
        group = part.group
    return rows
