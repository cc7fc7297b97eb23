"""Drawing tokens from logits.

Shapes: `_B` sequences, `_V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # tokens whose mass is added up before one of them is looked for


class Sampler:
    """Draws token ids by inverse transform.

    It reuses its buffers, because allocating them costs more than the arithmetic.

    On a CPU the mass of a large vocabulary is added up in blocks, and only the chosen block token
    by token.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, logits_BV: Tensor, draws_B: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids for uniform draws in [0, 1), and their log-probs, fp32.

        Ids are valid for any logits. If these are not finite, neither are the log-probs.
        """
        logits_BV = logits_BV.float()
        if self.temperature not in (0, 1):
            logits_BV = logits_BV / self.temperature
        rows, tokens = logits_BV.shape
        logp_BV = self._buffer("log-probs", rows, tokens, logits_BV)
        torch.log_softmax(logits_BV, dim=-1, out=logp_BV)
        if self.temperature == 0:
            chosen_B = logits_BV.argmax(dim=-1)
        elif logits_BV.device.type == "cpu" and tokens > 4 * BLOCK:
            chosen_B = self._in_blocks(logp_BV, draws_B)
        else:
            chosen_B = _search(logp_BV.exp().double().cumsum(dim=-1), draws_B)
        return chosen_B, logp_BV.gather(1, chosen_B[:, None])[:, 0]

    def _in_blocks(self, logp_BV: Tensor, draws_B: Tensor) -> Tensor:
        rows, tokens = logp_BV.shape
        blocks = -(-tokens // BLOCK)
        mass = self._buffer("mass", rows, blocks * BLOCK, logp_BV)
        torch.exp(logp_BV, out=mass[:, :tokens])
        mass_BKT = mass.view(rows, blocks, BLOCK)
        ends_BK = mass_BKT.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        block_B = _search(ends_BK, draws_B)
        before_BK = torch.nn.functional.pad(ends_BK[:, :-1], (1, 0))
        before_B = before_BK.gather(1, block_B[:, None])[:, 0]
        inside_BT = mass_BKT[torch.arange(rows), block_B].double().cumsum(dim=-1)
        points_B = draws_B * ends_BK[:, -1] - before_B
        token_B = _find(inside_BT, points_B.clamp(min=0.0))
        return (block_B * BLOCK + token_B).clamp(max=tokens - 1)

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """The first rows of a buffer, zeros when it is new."""
        kept = self._buffers.get(name)
        if kept is None or kept.shape[0] < rows or kept.shape[1] != columns:
            kept = self._buffers[name] = like.new_zeros(rows, columns)
        return kept[:rows]


def _search(mass_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The first token at which the mass up to it, (B, V) in float64, exceeds the draw's share."""
    return _find(mass_BV, draws_B * mass_BV[:, -1])


def _find(mass_BV: Tensor, points_B: Tensor) -> Tensor:
    # `right` skips tokens of zero mass; clamping keeps a rounded-up point inside the range
    total_B1 = mass_BV[:, -1:]
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    points_B1 = torch.minimum(points_B[:, None], below_B1).contiguous()
    chosen_B = torch.searchsorted(mass_BV, points_B1, right=True)[:, 0]
    return chosen_B.clamp(max=mass_BV.shape[1] - 1)  # NaN is above every mass
