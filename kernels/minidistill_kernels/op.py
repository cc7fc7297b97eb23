"""The op behind the functions on hidden states and the LM head.

Tokens are processed in chunks: a product with the head into a bounded buffer, a row kernel for the
statistics, coefficients per token, the logit gradient in place, and a product for d_hidden. The
upstream gradient is one factor per token and commutes with that last product. So d_hidden is
computed in the forward pass and only scaled in the backward pass. The gradient of a trainable head
is a sum over tokens, so there the upstream gradient must be the same for all tokens, as it is after
a sum or a mean.

If student and teacher share the head, the difference of their logits is computed from the
difference of their hidden states. Subtracting bf16 logits would lose most of a small KL. A bias
cancels in that difference, and a scale is part of the temperature. Softly capped logits have no
such difference: the teacher's are computed too, in fp32, and the logit gradient is multiplied by
the cap's slope. That takes a third buffer, so a chunk then has a third as many tokens.

Legend: _N tokens, _C tokens of a chunk, _H hidden, _V vocabulary, _K ids per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks, gemm
from minidistill_kernels.head import Head, finish, slope
from minidistill_kernels.objective import Objective, Terms, TokenData, token_terms
from minidistill_kernels.top_k import pick

# Bytes of a chunk's fp32 logit buffer, by device; with a teacher there are two.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
# Numeric fields of an Objective, in the order of the op's `settings`.
SETTINGS = (
    "adv_tau",
    "teacher_tau",
    "student_tau",
    "temperature",
    "ratio_clip_high",
    "token_mask_low",
    "token_mask_high",
)
METRICS = Terms._fields[1:7]
FLAGS = Terms._fields[7:]


def head_arguments(
    head: Head, teacher_NH: Tensor | None, teacher_head: Head | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[float]]:
    """The op's `bias`, `teacher`, `teacher_weight`, `teacher_bias` and `caps`."""
    if head.cap is not None and teacher_NH is not None and teacher_head is None:
        teacher_head = head
    teacher_NH = None if teacher_NH is None else teacher_NH.detach()
    if teacher_head is None:
        return head.bias_V, teacher_NH, None, None, [head.product_cap or 0.0, 0.0, 1.0]
    caps = [head.product_cap or 0.0, teacher_head.product_cap or 0.0]
    other = teacher_head.detach()
    factor = teacher_head.scale / head.scale
    return head.bias_V, teacher_NH, other.weight_VH, other.bias_V, [*caps, factor]


def chunk_tokens(
    tokens: int, vocab: int, chunk: int, device: torch.device, capped: bool = False
) -> int:
    """Tokens per chunk: `chunk`, or if that is 0 what fits CHUNK_BYTES, in multiples of 64.

    With `capped` logits it is a third, because they need a buffer more.
    """
    if chunk == 0:
        row = 4 * vocab * (3 if capped else 1)
        chunk = max(64, CHUNK_BYTES.get(device.type, 32 << 20) // row // 64 * 64)
    return min(tokens, chunk)


def compute(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    teacher_NH: Tensor | None,
    teacher_weight_VH: Tensor | None,
    teacher_bias_V: Tensor | None,
    caps: list[float],
    data: TokenData,
    topk_ids_NK: Tensor | None,
    valid_N: Tensor | None,
    obj: Objective,
    chunk: int,
    need_grad: bool,
    train_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms, (len(Terms), N) fp32; d loss / d hidden, (N, H), or (0, H) if not needed; and
    d sum(loss) / d head, (V, H) fp32, or (0, H), and of its bias, (V,) or (0,)."""
    cap, teacher_cap, teacher_factor = caps[0] or None, caps[1] or None, caps[2]
    tokens, vocab = hidden_NH.shape[0], weight_VH.shape[0]
    keep_N = checks.usable_rows(data.ids, vocab, valid_N)
    rows = None if keep_N is None else keep_N.nonzero()[:, 0]
    out = hidden_NH.new_zeros(len(Terms._fields), tokens, dtype=torch.float32)
    # fp16 cannot hold small unscaled gradients
    dtype = torch.float32 if hidden_NH.dtype == torch.float16 else hidden_NH.dtype
    shape = (tokens if need_grad else 0, hidden_NH.shape[1])
    d_hidden = hidden_NH.new_zeros(shape, dtype=dtype)
    shape = (vocab if train_head else 0, hidden_NH.shape[1])
    d_weight = hidden_NH.new_zeros(shape, dtype=torch.float32)
    biases = vocab if train_head and bias_V is not None else 0
    d_bias = hidden_NH.new_zeros(biases, dtype=torch.float32)
    count = tokens if rows is None else len(rows)
    if count == 0:
        return out, d_hidden, d_weight, d_bias
    size = chunk_tokens(count, vocab, chunk, hidden_NH.device, cap is not None)
    pair = teacher_weight_VH is not None
    s_CV, x_CV = _buffers(size, vocab, hidden_NH, teacher_NH is not None, pair)
    for i in range(0, count, size):
        at = slice(i, min(i + size, count)) if rows is None else rows[i : i + size]
        h_CH = hidden_NH[at]
        s, x = s_CV[: len(h_CH)], None if x_CV is None else x_CV[: len(h_CH)]
        gemm.project(s, h_CH, weight_VH)
        finish(s, bias_V, cap)
        slope_CV = slope(s, cap) if cap is not None and need_grad else None
        if teacher_NH is not None and x is not None:
            if teacher_weight_VH is not None:
                gemm.project(x, teacher_NH[at], teacher_weight_VH)
                finish(x, teacher_bias_V, teacher_cap)
                if teacher_factor != 1.0:
                    x.mul_(teacher_factor)
            else:
                difference_CH = h_CH.float() - teacher_NH[at].float()
                if h_CH.is_cuda:
                    difference_CH = difference_CH.to(h_CH.dtype)
                gemm.project(x, difference_CH, weight_VH)
        topk = None if topk_ids_NK is None else topk_ids_NK[at]
        terms, d_CV = _chunk(s, x, data.take(at), topk, obj, pair, need_grad, weight_VH.dtype)
        out[:, at] = torch.stack(terms)
        if d_CV is not None:
            if slope_CV is not None:
                d_CV.mul_(slope_CV)
            d_hidden[at] = gemm.pull_back(d_CV, weight_VH).to(dtype)
            if train_head:
                gemm.add_outer(d_weight, d_CV, h_CH)
                if bias_V is not None:
                    d_bias += d_CV.sum(0, dtype=torch.float32)
    return out, d_hidden, d_weight, d_bias


def _narrow(x: Tensor) -> bool:
    """Whether deltas and logit gradients are kept in the dtype of a half-precision input."""
    return x.is_cuda and backend.backend_for(x.device) == "triton"


def _buffers(
    size: int, vocab: int, like: Tensor, teacher: bool, pair: bool
) -> tuple[Tensor, Tensor | None]:
    """Buffers of a chunk: fp32 logits, and the difference or the teacher's logits, or None.

    On CUDA a difference may be half precision, because its error is relative to itself.
    """
    dtype = like.dtype if _narrow(like) and not pair else torch.float32
    s_CV = like.new_empty(size, vocab, dtype=torch.float32)
    return s_CV, like.new_empty(size, vocab, dtype=dtype) if teacher else None


def _chunk(
    s_CV: Tensor,
    x_CV: Tensor | None,
    data: TokenData,
    topk_ids_CK: Tensor | None,
    obj: Objective,
    pair: bool,
    need_grad: bool,
    grad_dtype: torch.dtype,
) -> tuple[Terms, Tensor | None]:
    """Terms of a chunk, and its logit gradient, in one of the buffers or a new one."""
    kernels = backend.row_kernels(s_CV.device)
    ids_C = data.ids.to(torch.int64)
    inv_t = 1.0 / obj.temperature
    picked = pick(s_CV, x_CV, topk_ids_CK, obj, pair) if obj.mode == "top_k" else None
    options: dict[str, Any] = {"pair": pair, "inv_temperature": inv_t, "mix": obj.mix}
    with_b = need_grad and obj.mode == "full"
    row = kernels.stats(s_CV, x_CV, ids_C, need_grad=with_b, **options)
    terms, grad = token_terms(obj, row, data, picked, x_CV is not None)
    if not need_grad:
        return terms, None
    grad = grad.times(inv_t)
    # The gradient overwrites a buffer that is no longer needed, in the head's dtype if possible.
    out_CV = s_CV
    if _narrow(s_CV) and grad_dtype != torch.float32:
        free = x_CV is not None and x_CV.dtype == grad_dtype
        out_CV = x_CV if free and x_CV is not None else torch.empty_like(s_CV, dtype=grad_dtype)
    x_used_CV = x_CV if with_b else None
    kernels.dlogits(
        s_CV,
        x_used_CV,
        out_CV,
        ids_C,
        row,
        base_C=grad.base,
        scale_C=grad.scale,
        target_C=grad.target,
        **options,
    )
    if picked is not None and grad.sparse is not None:
        out_CV.scatter_add_(1, picked.ids, grad.sparse.to(out_CV.dtype))
    return terms, out_CV


@torch.library.custom_op("minidistill_kernels::linear", mutates_args=())
def linear_op(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    caps: list[float],
    advantage: Tensor | None,
    sampler_logp: Tensor | None,
    teacher_logp: Tensor | None,
    topk_ids: Tensor | None,
    topk_teacher_logp: Tensor | None,
    valid: Tensor | None,
    mode: str,
    top_k: int,
    settings: list[float],
    kl_clip: float | None,
    chunk: int,
    need_grad: bool,
    train_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (N,), metrics (6, N), flags (3, N) bool, and the three gradients of `compute`.

    `caps` has the caps on h W^T + bias of student and teacher, 0 for none, and the factor that
    brings the teacher's logits to the student's scale.
    """
    data = TokenData(ids, advantage, sampler_logp, teacher_logp, topk_teacher_logp)
    if topk_ids is not None and bool(((topk_ids < 0) | (topk_ids >= weight.shape[0])).any()):
        raise ValueError(f"topk_ids_NK: an id is outside the vocabulary of {weight.shape[0]}")
    numbers = dict(zip(SETTINGS, settings, strict=True))
    obj = Objective(mode, top_k, kl_clip=kl_clip, **numbers)
    out, d_hidden, d_weight, d_bias = compute(
        hidden,
        weight,
        bias,
        teacher,
        teacher_weight,
        teacher_bias,
        caps,
        data,
        topk_ids,
        valid,
        obj,
        chunk,
        need_grad,
        train_head,
    )
    metrics = out[1 : 1 + len(METRICS)].clone()
    return out[0].clone(), metrics, out[1 + len(METRICS) :] > 0, d_hidden, d_weight, d_bias


@linear_op.register_fake
def _fake(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    need_grad, train_head = [*args, *kwargs.values()][-2:]
    tokens, width = hidden.shape
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(len(METRICS), tokens, dtype=torch.float32),
        hidden.new_empty(len(FLAGS), tokens, dtype=torch.bool),
        hidden.new_empty(tokens if need_grad else 0, width, dtype=dtype),
        hidden.new_empty(weight.shape[0] if train_head else 0, width, dtype=torch.float32),
        hidden.new_empty(
            weight.shape[0] if train_head and bias is not None else 0, dtype=torch.float32
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, flags, *gradients = output
    ctx.mark_non_differentiable(metrics, flags, *gradients)
    ctx.save_for_backward(*gradients)
    hidden, weight, _, bias, *others = inputs
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.constants = len(others)


def _backward(ctx: Any, d_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    weight = bias = None
    if len(d_weight):
        if not bool((d_loss == d_loss[0]).all()):
            raise RuntimeError(
                "a trainable head needs the same upstream gradient for all tokens: reduce the "
                "loss by a sum or a mean, and leave tokens out with `valid`"
            )
        weight = (d_weight * d_loss[0]).to(ctx.dtypes[1])
        if ctx.dtypes[2] is not None:
            bias = (d_bias * d_loss[0]).to(ctx.dtypes[2])
    hidden = (d_hidden * d_loss[:, None]).to(ctx.dtypes[0])
    return hidden, weight, None, bias, *[None] * ctx.constants


linear_op.register_autograd(_backward, setup_context=_setup)
