# mypy: disable-error-code="no-untyped-def"
"""Scoring without logits: log-prob and entropy of ids, tile by tile through the head, in Triton.

A program has one tile of tokens and one split of the vocabulary. It keeps running maxima and sums
over the split and writes four partial results per token. A second kernel combines the splits.
There is no (N, V) buffer, no atomic and no lock, so the result does not depend on the order of
execution.

Legend: _N tokens, _H hidden, _V vocabulary, _S splits of it; s: logits, z = (s - top) / T;
top: running maximum, total: sum of exp(z), first: sum of exp(z) z, at_y: the logit of the id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidistill_kernels import checks

# dtype of the inputs: (tokens, columns and depth of a tile, warps, stages)
TILES = {
    torch.bfloat16: (128, 128, 64, 8, 3),
    torch.float16: (128, 128, 64, 8, 3),
    torch.float32: (64, 64, 32, 8, 2),
}
# (tokens, warps) of a program of the second kernel
REDUCE = (128, 4)
# Programs to launch at least: about two for each of an H100's 132 multiprocessors.
PROGRAMS = 264


@triton.jit
def score_kernel(
    h_ptr, w_ptr, ids_ptr, part_ptr, tokens, vocab, width, h_stride, w_stride, part_stride,
    tiles_a_split, inv_t,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # neighboring programs share a split of the head, the larger operand, in the L2 cache
    tiles = tl.cdiv(tokens, BLOCK_N)
    split = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < tokens
    ids = tl.load(ids_ptr + rows, mask=real, other=0)
    # rows past the end read row 0, so that loads need no mask; their results are not stored
    h_rows = h_ptr + tl.where(real, rows, 0).to(tl.int64)[:, None] * h_stride
    top = tl.full([BLOCK_N], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    first = tl.zeros([BLOCK_N], tl.float32)
    at_y = tl.zeros([BLOCK_N], tl.float32)
    start = split * tiles_a_split * BLOCK_V
    for v in range(start, tl.minimum(start + tiles_a_split * BLOCK_V, vocab), BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V)
        w_rows = w_ptr + tl.where(cols < vocab, cols, 0).to(tl.int64)[None, :] * w_stride
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, width, BLOCK_H):
            deep = k + tl.arange(0, BLOCK_H)
            h = tl.load(h_rows + deep[None, :], mask=deep[None, :] < width, other=0.0)
            w = tl.load(w_rows + deep[:, None], mask=deep[:, None] < width, other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(h, w, acc, input_precision="ieee")
        s = tl.where(cols[None, :] < vocab, acc, float("-inf"))
        old, top = top, tl.maximum(top, tl.max(s, 1))
        fall = (old - top) * inv_t
        decay = tl.exp(fall)
        z = (s - top[:, None]) * inv_t
        e = tl.exp(z)
        first = decay * (first + fall * total) + tl.sum(tl.where(e > 0, e * z, 0.0), 1)
        total = decay * total + tl.sum(e, 1)
        at_y += tl.sum(tl.where(cols[None, :] == ids[:, None], s, 0.0), 1)
    out = part_ptr + split.to(tl.int64) * 4 * part_stride + rows
    tl.store(out, top, mask=real)
    tl.store(out + part_stride, total, mask=real)
    tl.store(out + 2 * part_stride, first, mask=real)
    tl.store(out + 3 * part_stride, at_y, mask=real)


@triton.jit
def reduce_kernel(
    part_ptr, logp_ptr, entropy_ptr, tokens, splits, part_stride, inv_t, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < tokens
    top = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.zeros([BLOCK], tl.float32)
    at_y = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = part_ptr + tl.cast(split, tl.int64) * 4 * part_stride + rows
        m = tl.load(part, mask=real, other=0.0)
        part_total = tl.load(part + part_stride, mask=real, other=1.0)
        part_first = tl.load(part + 2 * part_stride, mask=real, other=0.0)
        at_y += tl.load(part + 3 * part_stride, mask=real, other=0.0)
        old, top = top, tl.maximum(top, m)
        fall, part_fall = (old - top) * inv_t, (m - top) * inv_t
        decay, part_decay = tl.exp(fall), tl.exp(part_fall)
        first = decay * (first + fall * total)
        first += part_decay * (part_first + part_fall * part_total)
        total = decay * total + part_decay * part_total
    log_sum = tl.log(total)
    tl.store(logp_ptr + rows, (at_y - top) * inv_t - log_sum, mask=real)
    tl.store(entropy_ptr + rows, log_sum - first / total, mask=real)


def plan(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(token tiles, splits of the vocabulary, vocabulary tiles per split)."""
    block_n, block_v = TILES[dtype][:2]
    token_tiles = triton.cdiv(tokens, block_n)
    vocab_tiles = triton.cdiv(vocab, block_v)
    splits = max(1, min(vocab_tiles, triton.cdiv(PROGRAMS, token_tiles)))
    a_split = triton.cdiv(vocab_tiles, splits)
    return token_tiles, triton.cdiv(vocab_tiles, a_split), a_split


def score(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (N,) fp32, nats; ids are int64 and in range."""
    tokens, width = hidden_NH.shape
    vocab = weight_VH.shape[0]
    block_n, block_v, block_h, warps, stages = TILES[hidden_NH.dtype]
    token_tiles, splits, a_split = plan(tokens, vocab, hidden_NH.dtype)
    part_S4N = hidden_NH.new_empty(splits, 4, tokens, dtype=torch.float32)
    logp_N = hidden_NH.new_empty(tokens, dtype=torch.float32)
    entropy_N = torch.empty_like(logp_N)
    with torch.cuda.device_of(hidden_NH):
        score_kernel[(token_tiles * splits,)](
            hidden_NH, weight_VH, ids_N, part_S4N, tokens, vocab, width,
            hidden_NH.stride(0), weight_VH.stride(0), tokens, a_split, 1.0 / temperature,
            # the interpreter would multiply the bit patterns of bf16
            UPCAST=not hidden_NH.is_cuda and hidden_NH.dtype == torch.bfloat16,
            BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_H=block_h, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        block, warps = REDUCE
        reduce_kernel[(triton.cdiv(tokens, block),)](
            part_S4N,
            logp_N,
            entropy_N,
            tokens,
            splits,
            tokens,
            1.0 / temperature,
            BLOCK=block,
            num_warps=warps,
        )
    return logp_N, entropy_N


@torch.library.custom_op("minidistill_kernels::score", mutates_args=())
def score_op(
    hidden: Tensor, weight: Tensor, ids: Tensor, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), each (N,) fp32, nats, no gradient; 0 on rows that are not valid."""
    keep_N = checks.usable_rows(ids, weight.shape[0], valid)
    ids_N = ids.to(torch.int64)
    if keep_N is None:
        return score(hidden, weight, ids_N, temperature)
    rows = keep_N.nonzero()[:, 0]
    out = hidden.new_zeros(2, hidden.shape[0], dtype=torch.float32)
    if len(rows):
        out[:, rows] = torch.stack(score(hidden[rows], weight, ids_N[rows], temperature))
    return out[0].clone(), out[1].clone()


@score_op.register_fake
def _score_fake(
    hidden: Tensor, weight: Tensor, ids: Tensor, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    one = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return one, torch.empty_like(one)
