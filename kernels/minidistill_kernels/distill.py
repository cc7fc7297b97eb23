"""The objective of distillation for each token, from hidden states and the LM head.

Tokens are processed in chunks: a product with the head into a bounded buffer, a row kernel for the
statistics, coefficients per token, the logit gradient in place, and a product for d_hidden. The
upstream gradient is one factor per token and commutes with that last product. So d_hidden is
computed in the forward pass and only scaled in the backward pass. The gradient of a trainable head
is a sum over tokens, so there the upstream gradient must be the same for all tokens, as it is after
a sum or a mean.

If student and teacher share the head, the difference of their logits is computed from the
difference of their hidden states. Subtracting bf16 logits would lose most of a small KL.

Legend: _N tokens, _C tokens of a chunk, _H hidden, _V vocabulary, _K ids per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks, gemm
from minidistill_kernels.objective import DistillOutput, Objective, Terms, TokenData, token_terms
from minidistill_kernels.top_k import pick

# Bytes of a chunk's fp32 logit buffer, by device; with a teacher there are two.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
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


def linear_distill(
    h_s_NH: Tensor,
    weight_VH: Tensor,
    ids_N: Tensor,
    *,
    h_t_NH: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logp_N: Tensor | None = None,
    topk_ids_NK: Tensor | None = None,
    teacher_topk_logp_NK: Tensor | None = None,
    advantage_N: Tensor | None = None,
    sampler_logp_N: Tensor | None = None,
    estimator: str = "full",
    top_k: int = 64,
    adv_tau: float = 0.5,
    teacher_tau: float = 0.5,
    student_tau: float = 0.5,
    temperature: float = 1.0,
    ratio_clip_high: float = 2.0,
    token_mask_low: float = 0.125,
    token_mask_high: float = 8.0,
    kl_clip: float | None = None,
    valid: Tensor | None = None,
    chunk: int | None = None,
) -> DistillOutput:
    """Loss and metrics of on-policy distillation, from hidden states and the LM head.

    With pi and q the distributions of student and teacher at `temperature`, mu the sampler's, y the
    sampled token, A its advantage and rho = min(pi(y) / mu(y), ratio_clip_high), detached, the loss
    of a token is

        full     -rho adv_tau A log pi(y) + sum_v pi_v (student_tau log pi_v - teacher_tau log q_v)
        top_k    the same sum over the student's k likeliest ids and one bucket for the rest
        sampled  -rho [adv_tau A + teacher_tau log q(y) - student_tau log pi(y)] log pi(y),
                 the bracket detached (the policy-gradient form of the reverse KL: Lu et al.,
                 "On-Policy Distillation", 2025)

    Tokens whose pi(y) / mu(y) is outside [token_mask_low, token_mask_high] get no loss and no
    gradient. `kl_clip` bounds the distillation term: in `sampled` it is clamped to +-kl_clip,
    otherwise scaled down to kl_clip. Memory is bounded by the logits of `chunk` tokens.

    Args:
        h_s_NH: (N, H) student's hidden states; float32, bfloat16 or float16. Differentiable.
        weight_VH: (V, H) head, same dtype. If it requires a gradient, that is accumulated in fp32,
            and the loss must be reduced by a sum or a mean.
        ids_N: (N,) sampled tokens, int64 or int32; -100 is padding.
        h_t_NH: (N, H) teacher's hidden states, same dtype; detached.
        teacher_weight: (V, H) the teacher's own head, if it is not the student's. With it the
            teacher's hidden states may have another width.
        teacher_logp_N: (N,) log q(y), scored elsewhere; for `sampled` without `h_t_NH`.
        topk_ids_NK: (N, K) distinct ids, the student's likeliest; for `top_k` without `h_t_NH`.
        teacher_topk_logp_NK: (N, K) log q at `topk_ids_NK`, scored elsewhere.
        advantage_N: (N,) A, centered; None is 0.
        sampler_logp_N: (N,) log mu(y); None makes rho 1.
        estimator: "full" (needs `h_t_NH`), "sampled" or "top_k".
        top_k: k of `top_k` with `h_t_NH`.
        valid: (N,) bool; rows that are False are not computed.
        chunk: tokens at a time; None fits 64 MiB of fp32 logits on a CPU, 1 GiB on CUDA.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, has no rows, requires a gradient
            that is not computed (a teacher's head), or an id is out of range.
        RuntimeError: in the backward pass, the head requires a gradient, and the upstream gradient
            is not the same for all tokens.
    """
    n = h_s_NH.shape[0]
    checks.states(h_s_NH, weight_VH, h_t_NH, teacher_weight, trainable=True)
    device = h_s_NH.device
    checks.per_token("ids_N", ids_N, n, device, "ids")
    per_token = {
        "advantage_N": advantage_N,
        "sampler_logp_N": sampler_logp_N,
        "teacher_logp_N": teacher_logp_N,
    }
    for name, x in per_token.items():
        if x is not None:
            checks.per_token(name, x, n, device, "float")
    if valid is not None:
        checks.per_token("valid", valid, n, device, "bool")
    checks.teacher_inputs(estimator, h_t_NH, teacher_logp_N, topk_ids_NK, teacher_topk_logp_NK)
    if topk_ids_NK is not None and teacher_topk_logp_NK is not None:
        checks.top_k_inputs(topk_ids_NK, teacher_topk_logp_NK, n, device)
    checks.objective_numbers(
        top_k, temperature, ratio_clip_high, token_mask_low, token_mask_high, kl_clip
    )
    taus = {"adv_tau": adv_tau, "teacher_tau": teacher_tau, "student_tau": student_tau}
    for name, tau in taus.items():
        checks.finite(name, tau)
    settings = (
        adv_tau,
        teacher_tau,
        student_tau,
        temperature,
        ratio_clip_high,
        token_mask_low,
        token_mask_high,
    )
    constants = (
        h_t_NH,
        teacher_weight,
        advantage_N,
        sampler_logp_N,
        teacher_logp_N,
        topk_ids_NK,
        teacher_topk_logp_NK,
        valid,
    )
    grad = torch.is_grad_enabled()
    loss, metrics, flags, *_ = linear_op(
        h_s_NH,
        weight_VH,
        ids_N,
        *(None if x is None else x.detach() for x in constants),
        estimator,
        top_k,
        [float(x) for x in settings],
        None if kl_clip is None else float(kl_clip),
        checks.chunk_size(chunk),
        grad and (h_s_NH.requires_grad or weight_VH.requires_grad),
        grad and weight_VH.requires_grad,
    )
    logp, teacher_logp, kl, entropy, teacher_entropy, ratio = metrics.unbind(0)
    return DistillOutput(
        loss,
        logp,
        teacher_logp,
        kl,
        entropy,
        None if h_t_NH is None else teacher_entropy,
        ratio,
        *flags.unbind(0),
    )


def chunk_tokens(tokens: int, vocab: int, chunk: int, device: torch.device) -> int:
    """Tokens per chunk: `chunk`, or if that is 0 what fits CHUNK_BYTES, in multiples of 64."""
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
    """The terms, (len(Terms), N) fp32; d loss / d hidden, (N, H), or (0, H) if not needed; and
    d sum(loss) / d head, (V, H) fp32, or (0, H)."""
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
    """loss (N,), metrics (6, N), flags (3, N) bool, and the two gradients of `compute`."""
    data = TokenData(ids, advantage, sampler_logp, teacher_logp, topk_teacher_logp)
    if topk_ids is not None and bool(((topk_ids < 0) | (topk_ids >= weight.shape[0])).any()):
        raise ValueError(f"topk_ids_NK: an id is outside the vocabulary of {weight.shape[0]}")
    numbers = dict(zip(SETTINGS, settings, strict=True))
    obj = Objective(mode, top_k, kl_clip=kl_clip, **numbers)
    out, d_hidden, d_weight = compute(
        hidden,
        weight,
        teacher,
        teacher_weight,
        data,
        topk_ids,
        valid,
        obj,
        chunk,
        need_grad,
        train_head,
    )
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
    ctx.constants = len(inputs) - 2


def _backward(ctx: Any, d_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    head = None
    if len(d_weight):
        if not bool((d_loss == d_loss[0]).all()):
            raise RuntimeError(
                "a trainable head needs the same upstream gradient for all tokens: reduce the "
                "loss by a sum or a mean, and leave tokens out with `valid`"
            )
        head = (d_weight * d_loss[0]).to(ctx.dtypes[1])
    return (d_hidden * d_loss[:, None]).to(ctx.dtypes[0]), head, *[None] * ctx.constants


linear_op.register_autograd(_backward, setup_context=_setup)
