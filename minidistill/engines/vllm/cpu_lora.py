"""Adapters in vLLM on a CPU: a product for each adapter of a batch.

vLLM's own functions for the CPU copy an adapter's matrices once for every token, which makes
reading and decoding with one many times slower than without, and give rows without an adapter
(index -1) the one in the last slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Group = tuple[int, Tensor | None]
"""An adapter's slot and its rows, None where it is all of them."""


def groups(indices: Tensor) -> list[Group]:
    """The batch's rows by adapter; those with index -1 have none."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def update_metadata(self: Any, *arguments: Any, **named: Any) -> None:
    """As vLLM's, once a step; and the groups, which every layer then uses."""
    _update_metadata(self, *arguments, **named)
    self.groups = groups(self.token_lora_indices)


def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Sequence[Tensor],
    lora_b_stacked: Sequence[Tensor],
    scale: float,
    output_slices: Sequence[int],
    **unused: Any,
) -> None:
    """y[rows, slice] += scale * x[rows] @ a[slot].T @ b[slot].T for each adapter and each slice.

    a is (slots, 1, rank, in), b (slots, 1, out, rank).
    """
    rows_in, rows_out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, rows in self.groups:
        own = rows_in if rows is None else rows_in[rows]
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            part = (own @ a[slot, 0].T) @ b[slot, 0].T[:, :size] * scale
            place = rows_out[:, start : start + size]
            if rows is None:
                place += part
            else:
                place.index_add_(0, rows, part)
            start += size


_update_metadata = PunicaWrapperCPU.update_metadata
if _update_metadata is not update_metadata:
    PunicaWrapperCPU.update_metadata = update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign]
