"""The one op behind the linear family: log-probs, divergences and d_hidden in one pass.

Tokens go through in chunks: a product with the head into a bounded buffer, a row kernel for the
statistics, coefficients per token, the logit gradient in place, a product for d_hidden. A per-row
upstream gradient commutes with that last product: d_hidden is computed in the forward pass and only
scaled in the backward pass. The gradient of a head that is trained sums over rows, so there the
upstream gradient must be the same for all of them, as it is after a sum or a mean.

Where student and teacher share the head, their logits' difference comes from the difference of
the hidden states. Subtracting two sets of bf16 logits instead loses most of a small KL.

Legend: _N tokens, _C tokens of a chunk, _H hidden, _V vocabulary, _K ids a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks, gemm
from minidistill_kernels.objective import Objective, Picked, Terms, TokenData, token_terms

# Bytes of one fp32 logit buffer of a chunk; two exist where there is a teacher.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# The numbers of an Objective, in the order in which the op takes them.
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


def chunk_tokens(tokens: int, vocab: int, chunk: int, device: torch.device) -> int:
    """Tokens a chunk: as asked, or what fits CHUNK_BYTES in multiples of 64."""
    if chunk == 0:
        chunk = max(64, CHUNK_BYTES.get(device.type, 64 << 20) // (4 * vocab) // 64 * 64)
    return min(tokens, chunk)


def compute(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_NH: Tensor | None,
    teacher_weight_VH: Tensor | None,
    data: TokenData,
    topk_ids_NK: Tensor | None,
    valid_N: Tensor | None,
    obj: Objective,
    chunk: int,
    need_grad: bool,
    train_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms as (len(Terms), N) fp32, d loss / d hidden, (N, H) or (0, H), and d sum(loss) / d head,
    (V, H) fp32 or (0, H)."""
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
    count = tokens if rows is None else len(rows)
    if count == 0:
        return out, d_hidden, d_weight
    size = chunk_tokens(count, vocab, chunk, hidden_NH.device)
    pair = teacher_weight_VH is not None
    s_CV, x_CV = _buffers(size, vocab, hidden_NH, teacher_NH is not None, pair)
    for i in range(0, count, size):
        at = slice(i, min(i + size, count)) if rows is None else rows[i : i + size]
        h_CH = hidden_NH[at]
        s, x = s_CV[: len(h_CH)], None if x_CV is None else x_CV[: len(h_CH)]
        gemm.project(s, h_CH, weight_VH)
        if teacher_NH is not None and x is not None:
            if teacher_weight_VH is not None:
                gemm.project(x, teacher_NH[at], teacher_weight_VH)
            else:
                difference_CH = h_CH.float() - teacher_NH[at].float()
                if h_CH.is_cuda:
                    difference_CH = difference_CH.to(h_CH.dtype)
                gemm.project(x, difference_CH, weight_VH)
        topk = None if topk_ids_NK is None else topk_ids_NK[at]
        terms, d_CV = _chunk(s, x, data.take(at), topk, obj, pair, need_grad, weight_VH.dtype)
        out[:, at] = torch.stack(terms)
        if d_CV is not None:
            d_hidden[at] = gemm.pull_back(d_CV, weight_VH).to(dtype)
            if train_head:
                gemm.add_outer(d_weight, d_CV, h_CH)
    return out, d_hidden, d_weight


def _narrow(x: Tensor) -> bool:
    """Whether deltas and logit gradients are held in a half-precision input's dtype."""
    return x.is_cuda and backend.backend_for(x.device) == "triton"


def _buffers(
    size: int, vocab: int, like: Tensor, teacher: bool, pair: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32. A difference may be bf16 on CUDA: its error is relative to itself."""
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
    """Terms of a chunk, and its logit gradient in one of the buffers or a new one."""
    kernels = backend.row_kernels(s_CV.device)
    ids_C = data.ids.to(torch.int64)
    inv_t = 1.0 / obj.temperature
    picked = _pick(s_CV, x_CV, topk_ids_CK, obj, pair) if obj.mode == "top_k" else None
    how: dict[str, Any] = {"pair": pair, "inv_temperature": inv_t, "mix": obj.mix}
    with_b = need_grad and obj.mode == "full"
    row = kernels.stats(s_CV, x_CV, ids_C, need_grad=with_b, **how)
    terms, grad = token_terms(obj, row, data, picked, x_CV is not None)
    if not need_grad:
        return terms, None
    grad = grad.times(inv_t)
    # The gradient takes a buffer that is no longer needed; in the head's dtype for the product.
    out_CV = s_CV
    if _narrow(s_CV) and grad_dtype != torch.float32:
        free = x_CV is not None and x_CV.dtype == grad_dtype
        out_CV = x_CV if free and x_CV is not None else torch.empty_like(s_CV, dtype=grad_dtype)
    x_used_CV = x_CV if with_b else None
    kernels.dlogits(
        s_CV, x_used_CV, out_CV, ids_C, row,
        base_C=grad.base, scale_C=grad.scale, target_C=grad.target, **how,
    )  # fmt: skip
    if picked is not None and grad.sparse is not None:
        out_CV.scatter_add_(1, picked.ids, grad.sparse.to(out_CV.dtype))
    return terms, out_CV


def _pick(
    s_CV: Tensor, x_CV: Tensor | None, ids_CK: Tensor | None, obj: Objective, pair: bool
) -> Picked:
    vocab = s_CV.shape[1]
    if ids_CK is None:
        ids_CK = _largest(s_CV, min(obj.top_k, vocab))
    ids_CK = ids_CK.to(torch.int64)
    top_CK = s_CV.gather(1, ids_CK)
    delta_CK = None
    if x_CV is not None:
        delta_CK = x_CV.gather(1, ids_CK).float()
        delta_CK = top_CK - delta_CK if pair else delta_CK
    return Picked(ids_CK, top_CK, delta_CK, ids_CK.shape[1] == vocab)


def _largest(s_CV: Tensor, k: int, group: int = 64) -> Tensor:
    """Ids of the k largest: on a CPU first the k groups with the largest maxima, then inside."""
    vocab = s_CV.shape[1]
    groups = vocab // group
    if s_CV.is_cuda or k * 4 > groups:
        return s_CV.topk(k, dim=1, sorted=False).indices
    whole = groups * group
    top_CG = s_CV[:, :whole].unflatten(1, (groups, group)).amax(2).topk(k, sorted=False).indices
    inside = torch.arange(group, device=s_CV.device)
    ids_CM = (top_CG[:, :, None] * group + inside).flatten(1)
    tail = torch.arange(whole, vocab, device=s_CV.device).expand(len(s_CV), -1)
    ids_CM = torch.cat([ids_CM, tail], 1)
    best_CK = s_CV.gather(1, ids_CM).topk(k, sorted=False).indices
    return ids_CM.gather(1, best_CK)


@torch.library.custom_op("minidistill_kernels::linear", mutates_args=())
def linear_op(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (N,), metrics (6, N), flags (3, N) bool, and the gradients that `compute` returns)."""
    data = TokenData(ids, advantage, sampler_logp, teacher_logp, topk_teacher_logp)
    if topk_ids is not None and bool(((topk_ids < 0) | (topk_ids >= weight.shape[0])).any()):
        raise ValueError(f"topk_ids_NK: an id is outside the vocabulary of {weight.shape[0]}")
    numbers = dict(zip(SETTINGS, settings, strict=True))
    obj = Objective(mode, top_k, kl_clip=kl_clip, **numbers)
    out, d_hidden, d_weight = compute(
        hidden, weight, teacher, teacher_weight, data, topk_ids, valid, obj, chunk, need_grad,
        train_head,
    )  # fmt: skip
    metrics = out[1 : 1 + len(METRICS)].clone()
    return out[0].clone(), metrics, out[1 + len(METRICS) :] > 0, d_hidden, d_weight


@linear_op.register_fake
def _fake(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    need_grad, train_head = [*args, *kwargs.values()][-2:]
    tokens, width = hidden.shape
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(len(METRICS), tokens, dtype=torch.float32),
        hidden.new_empty(len(FLAGS), tokens, dtype=torch.bool),
        hidden.new_empty(tokens if need_grad else 0, width, dtype=dtype),
        hidden.new_empty(weight.shape[0] if train_head else 0, width, dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, flags, d_hidden, d_weight = output
    ctx.mark_non_differentiable(metrics, flags, d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.others = len(inputs) - 2


def _backward(ctx: Any, d_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    head = None
    if len(d_weight):
        if not bool((d_loss == d_loss[0]).all()):
            raise RuntimeError(
                "a trained head needs one upstream gradient for all tokens: reduce the loss by a "
                "sum or a mean, and leave tokens out with `valid`"
            )
        head = (d_weight * d_loss[0]).to(ctx.dtypes[1])
    return (d_hidden * d_loss[:, None]).to(ctx.dtypes[0]), head, *[None] * ctx.others


linear_op.register_autograd(_backward, setup_context=_setup)
