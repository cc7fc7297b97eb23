# mypy: disable-error-code="no-untyped-def"
"""The row kernels in Triton: softmax statistics of a row, and its logit gradient.

The same functions as in `torch_rows`. One program per row, all rows on grid axis 0 (the only one
without a limit of 65,535), one online pass (Milakov and Gimelshein, arXiv 1805.02867). Running
maxima are scalars. The sums stay per lane until the end, so a block needs one reduction for each
maximum.

Legend: _C tokens of a chunk, _V vocabulary; s: student's logits, z = s / T; x: delta = s - t, or
the teacher's logits t; top: running maximum, sum: of exp, first: of exp times the exponent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidistill_kernels.stats import RowStats

NONE, DELTA, PAIR = 0, 1, 2
# (columns per block, warps): the smallest block that holds a row is used, else the last. They are
# fixed, because autotuning would run a kernel that overwrites its input several times. Blocks of
# more than 16,384 columns spill. Statistics with a teacher keep five sums per lane: 4096 columns
# needed 167 registers, which leaves one program per multiprocessor.
BLOCKS = ((1024, 4), (4096, 8))
TEACHER_BLOCKS = ((1024, 4), (2048, 8))


@triton.jit
def stats_kernel(
    s_ptr, x_ptr, ids_ptr, out_ptr, vocab, s_stride, x_stride, out_stride, inv_t,
    X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # int64, because tokens * vocabulary can exceed 2^31
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    x_row = x_ptr + row * x_stride
    cols = tl.arange(0, BLOCK)
    # finite, because (-inf) - (-inf) is NaN, and far from the limit, to be divided by a small T
    top = -1.0e30
    sum_z = tl.zeros([BLOCK], tl.float32)
    first_z = tl.zeros([BLOCK], tl.float32)
    if X != 0:
        # x is shifted by its value at the largest logit of the first block. Otherwise a common
        # offset of the logits, which changes no probability, would make a small KL inaccurate.
        s = tl.load(s_row + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
        x = tl.load(x_row + cols, mask=cols < vocab, other=0.0).to(tl.float32)
        if X == 2:
            x = s - x
        shift = tl.max(tl.where(s == tl.max(s, 0), x, float("-inf")), 0)
        shift = tl.where(tl.abs(shift) < 1.0e30, shift, 0.0)
        q_top = -1.0e30
        first_x = tl.zeros([BLOCK], tl.float32)
        sum_q = tl.zeros([BLOCK], tl.float32)
        first_q = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + cols
        inside = at < vocab
        s = tl.load(s_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        old, top = top, tl.maximum(top, tl.max(s, 0))
        # the difference first: dividing by T before would round large logits once more
        fall = (old - top) * inv_t
        z = (s - top) * inv_t
        decay = tl.exp(fall)
        e = tl.exp(z)
        # where: 0 * inf is NaN
        first_z = decay * (first_z + fall * sum_z) + tl.where(e > 0, e * z, 0.0)
        sum_z = decay * sum_z + e
        if X != 0:
            pad = 0.0 if X == 1 else float("-inf")
            t = tl.load(x_row + at, mask=inside, other=pad).to(tl.float32)
            if X == 1:
                x = t - shift
                sq = s - x
            else:
                x = (s - t) - shift
                sq = tl.where(s > float("-inf"), s - x, t + shift)
            first_x = decay * first_x + tl.where(e > 0, e * x, 0.0)
            q_old, q_top = q_top, tl.maximum(q_top, tl.max(sq, 0))
            q_fall = (q_old - q_top) * inv_t
            q_decay = tl.exp(q_fall)
            # not (s - x) - max: this order is exact for the columns that matter
            w = (s - q_top) - x
            if X == 2:
                w = tl.where(s > float("-inf"), w, (t + shift) - q_top)
            w *= inv_t
            eq = tl.exp(w)
            first_q = q_decay * (first_q + q_fall * sum_q)
            first_q += tl.where(eq > 0, eq * w, 0.0)
            sum_q = q_decay * sum_q + eq
    out = out_ptr + row
    total = tl.sum(sum_z, 0)
    log_sum = tl.log(total)
    z_mean = tl.sum(first_z, 0) / total
    y = tl.load(ids_ptr + row)
    s_y = tl.load(s_row + y).to(tl.float32)
    tl.store(out, top)
    tl.store(out + out_stride, log_sum)
    tl.store(out + 2 * out_stride, z_mean)
    tl.store(out + 3 * out_stride, (s_y - top) * inv_t - log_sum)
    tl.store(out + 4 * out_stride, log_sum - z_mean)
    if X != 0:
        q_total = tl.sum(sum_q, 0)
        q_log_sum = tl.log(q_total)
        x_mean = tl.sum(first_x, 0) / total
        x_y = tl.load(x_row + y).to(tl.float32)
        w_y = (x_y + shift) - q_top
        if X == 1:
            w_y = (s_y - q_top) - (x_y - shift)
        kl = (x_mean + (q_top - top)) * inv_t + tl.log(q_total / total)
        tl.store(out + 5 * out_stride, x_mean + shift)
        tl.store(out + 6 * out_stride, kl)
        tl.store(out + 7 * out_stride, w_y * inv_t - q_log_sum)
        tl.store(out + 8 * out_stride, q_log_sum - tl.sum(first_q, 0) / q_total)


@triton.jit
def dlogits_kernel(
    s_ptr, x_ptr, out_ptr, ids_ptr, top_ptr, log_sum_ptr, z_mean_ptr, d_mean_ptr,
    base_ptr, scale_ptr, target_ptr, vocab, s_stride, x_stride, out_stride, inv_t, mix_x, mix_z,
    X: tl.constexpr, SCALE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    base = tl.load(base_ptr + row)
    if SCALE:
        scale = tl.load(scale_ptr + row)
        z_mean = tl.load(z_mean_ptr + row)
    if X != 0:
        d_mean = tl.load(d_mean_ptr + row)
    if TARGET:
        target = tl.load(target_ptr + row)
        y = tl.load(ids_ptr + row)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        s = tl.load(s_ptr + row * s_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        z = (s - top) * inv_t
        p = tl.exp(z - log_sum)
        factor = base
        if SCALE:
            b = mix_z * (z - z_mean)
            if X != 0:
                x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
                x = x.to(tl.float32)
                if X == 2:
                    x = s - x
                # b is NaN for 0 * inf (mix_z is 0 with equal taus); `p > 0` below drops those
                b += mix_x * ((x - d_mean) * inv_t)
            factor = base + scale * b
        g = tl.where(p > 0, p * factor, 0.0)
        if TARGET:
            g += tl.where(at == y, target, 0.0)
        tl.store(out_ptr + row * out_stride + at, g.to(out_ptr.dtype.element_ty), mask=inside)


def _pick(table: tuple[tuple[int, int], ...], vocab: int) -> tuple[int, int]:
    return next((entry for entry in table if entry[0] >= vocab), table[-1])


def _check(*matrices: Tensor | None) -> None:
    for x in matrices:
        assert x is None or x.stride(1) == 1, "row kernels need contiguous columns"


def stats(
    s_CV: Tensor,
    x_CV: Tensor | None,
    ids_C: Tensor,
    *,
    pair: bool = False,
    inv_temperature: float = 1.0,
    mix: tuple[float, float] = (1.0, 0.0),
    need_grad: bool = True,
) -> RowStats:
    """Statistics of each row, fp32; the inputs (fp32, bf16 or fp16) are only read.

    `x_CV` is delta, or with `pair` the teacher's logits. `mix` and `need_grad` are unused; the
    torch kernel needs them.
    """
    _check(s_CV, x_CV)
    tokens, vocab = s_CV.shape
    out = s_CV.new_zeros(len(RowStats._fields), tokens, dtype=torch.float32)
    kind = NONE if x_CV is None else PAIR if pair else DELTA
    block, warps = _pick(BLOCKS if kind == NONE else TEACHER_BLOCKS, vocab)
    x_CV = s_CV if x_CV is None else x_CV
    with torch.cuda.device_of(s_CV):
        stats_kernel[(tokens,)](
            s_CV, x_CV, ids_C, out, vocab, s_CV.stride(0), x_CV.stride(0), out.stride(0),
            inv_temperature, X=kind, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return RowStats(*out)


def dlogits(
    s_CV: Tensor,
    x_CV: Tensor | None,
    out_CV: Tensor,
    ids_C: Tensor,
    row: RowStats,
    *,
    base_C: Tensor,
    scale_C: Tensor | None,
    target_C: Tensor | None,
    pair: bool = False,
    inv_temperature: float = 1.0,
    mix: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """pi_v (base + scale (b_v - E b)) + target [v = id], into `out_CV`; None stands for 0.

    b = mix[0] delta + mix[1] z. `out_CV` may be one of the inputs, because each element is read by
    the thread that writes it.
    """
    _check(s_CV, x_CV, out_CV)
    tokens, vocab = s_CV.shape
    block, warps = _pick(BLOCKS, vocab)
    kind = NONE if x_CV is None or scale_C is None else PAIR if pair else DELTA
    x_CV = s_CV if x_CV is None else x_CV
    with torch.cuda.device_of(s_CV):
        dlogits_kernel[(tokens,)](
            s_CV, x_CV, out_CV, ids_C, row.top, row.log_sum, row.z_mean, row.d_mean,
            base_C, base_C if scale_C is None else scale_C,
            base_C if target_C is None else target_C,
            vocab, s_CV.stride(0), x_CV.stride(0), out_CV.stride(0),
            inv_temperature, *mix,
            X=kind, SCALE=scale_C is not None, TARGET=target_C is not None,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out_CV
