"""LoRA in vLLM on a CPU: one product for each adapter in a batch.

vLLM's own CPU functions copy an adapter's matrices once for every token, which makes prefill and
decoding many times slower with an adapter than without. They also give rows without an adapter
(index -1) the one in the last slot. This module replaces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Group = tuple[int, Tensor | None]
"""An adapter's slot and its rows; None for all rows."""


def groups(indices: Tensor) -> list[Group]:
    """The rows of a batch by adapter. Rows with index -1 have none."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def update_metadata(self: Any, *arguments: Any, **named: Any) -> None:
    """Like vLLM's, which runs once a step; also computes the groups that every layer uses."""
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
        inputs = rows_in if rows is None else rows_in[rows]
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            part = (inputs @ a[slot, 0].T) @ b[slot, 0].T[:, :size] * scale
            outputs = rows_out[:, start : start + size]
            if rows is None:
                outputs += part
            else:
                outputs.index_add_(0, rows, part)
            start += size


_update_metadata = PunicaWrapperCPU.update_metadata
if _update_metadata is not update_metadata:
    PunicaWrapperCPU.update_metadata = update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign]
