"""Log-prob, entropy and reverse KL of logits, row by row.

With pi = softmax(z), the gradients with respect to z_v are

    d log pi_y = [v = y] - pi_v,
    d entropy = -pi_v (z_v - E z),
    d KL(pi || q) = pi_v (delta_v - E delta), where delta = z - z^q.

Legend: _N tokens, _C tokens of a chunk, _V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidistill_kernels import backend, checks
from minidistill_kernels.stats import RowStats

# Elements that are copied to fp32 at a time for the torch kernels, which work in place.
CHUNK_ELEMENTS = 1 << 22
LOWEST = -1.0e30


def selective_logprob(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, return_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at `ids`, and the entropy of each row.

    Args:
        logits: (N, V) float32, bfloat16 or float16; rows may be strided, columns not.
        ids: (N,) int64 or int32; -100 is padding: 0 and no gradient.
        return_entropy: also return the entropy of each row. Both outputs are differentiable.

    Returns:
        (N,) fp32 log-probs, and (N,) fp32 entropies in nats or None.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or an id is out of range.
    """
    checks.matrix("logits", logits)
    checks.per_token("ids", ids, logits.shape[0], logits.device, "ids")
    checks.positive("temperature", temperature)
    logp, entropy, _ = logprob_op(logits, ids, float(temperature))
    return logp, entropy if return_entropy else None


def reverse_kl(
    s_logits: Tensor, t_logits: Tensor, *, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL(softmax(s_logits / temperature) || softmax(t_logits / temperature)) of each row.

    Args:
        s_logits: (N, V) student's, float32, bfloat16 or float16; differentiable.
        t_logits: (N, V) teacher's, same dtype; must not require a gradient.
        valid: (N,) bool; rows that are False are 0 without a gradient, whatever they contain.

    Returns:
        (N,) fp32, nats, never negative; inf if q is 0 for an id for which pi is not.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or the teacher requires a
            gradient.
    """
    checks.matrix("s_logits", s_logits)
    checks.matrix("t_logits", t_logits)
    checks.like("t_logits", t_logits, "s_logits", s_logits)
    checks.same_shape("t_logits", t_logits, "s_logits", s_logits)
    checks.no_gradient("t_logits", t_logits)
    checks.positive("temperature", temperature)
    if valid is not None:
        checks.per_token("valid", valid, s_logits.shape[0], s_logits.device, "bool")
    kl, _ = kl_op(s_logits, t_logits.detach(), valid, float(temperature))
    return kl


def _slices(logits_NV: Tensor, triton: bool) -> list[slice]:
    """Rows per call: all of them for the Triton kernels, which only read their input."""
    n, vocab = logits_NV.shape
    size = n if triton else max(1, CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _scratch(x_CV: Tensor, keep_C: Tensor | None, triton: bool) -> Tensor:
    """The input itself, or an fp32 copy to overwrite, without -inf and with unused rows at 0."""
    if triton:
        return x_CV
    copy_CV = x_CV.to(torch.float32, copy=True)
    if keep_C is not None:
        copy_CV[~keep_C] = 0.0
    return copy_CV.clamp_(min=LOWEST)


def _usable(ids_N: Tensor, vocab: int, valid_N: Tensor | None) -> tuple[Tensor | None, Tensor]:
    keep_N = checks.usable_rows(ids_N, vocab, valid_N)
    safe_N = ids_N.to(torch.int64)
    return keep_N, safe_N if keep_N is None else safe_N.masked_fill(~keep_N, 0)


def _stats_of(
    s_NV: Tensor, t_NV: Tensor | None, ids_N: Tensor, keep_N: Tensor | None, temperature: float
) -> Tensor:
    """(len(RowStats), N) fp32; 0 on rows that are not kept."""
    triton = backend.backend_for(s_NV.device) == "triton"
    kernels = backend.row_kernels(s_NV.device)
    out = s_NV.new_empty(len(RowStats._fields), s_NV.shape[0], dtype=torch.float32)
    for at in _slices(s_NV, triton):
        keep_C = None if keep_N is None else keep_N[at]
        row = kernels.stats(
            _scratch(s_NV[at], keep_C, triton),
            None if t_NV is None else _teacher(t_NV[at], keep_C, triton),
            ids_N[at],
            pair=t_NV is not None,
            inv_temperature=1.0 / temperature,
            need_grad=False,
        )
        out[:, at] = torch.stack(row)
    return out if keep_N is None else torch.where(keep_N, out, 0.0)


def _teacher(t_CV: Tensor, keep_C: Tensor | None, triton: bool) -> Tensor:
    """Like `_scratch`, but -inf stays, so that the divergence becomes infinite."""
    if triton:
        return t_CV
    copy_CV = t_CV.to(torch.float32, copy=True)
    if keep_C is not None:
        copy_CV[~keep_C] = 0.0
    return copy_CV


def _dlogits_of(
    s_NV: Tensor,
    t_NV: Tensor | None,
    ids_N: Tensor,
    keep_N: Tensor | None,
    stats: Tensor,
    temperature: float,
    base_N: Tensor,
    scale_N: Tensor | None,
    target_N: Tensor | None,
) -> Tensor:
    """The gradient of the logits, in their dtype; the coefficients are with respect to z."""
    triton = backend.backend_for(s_NV.device) == "triton"
    kernels = backend.row_kernels(s_NV.device)
    out_NV = torch.empty_like(s_NV, memory_format=torch.contiguous_format)
    options: dict[str, Any] = {
        "pair": t_NV is not None,
        "inv_temperature": 1.0 / temperature,
        "mix": (0.0, 1.0) if t_NV is None else (1.0, 0.0),
    }
    coefficients = [
        None if x is None else (x if keep_N is None else torch.where(keep_N, x, 0.0)) / temperature
        for x in (base_N, scale_N, target_N)
    ]
    for at in _slices(s_NV, triton):
        keep_C = None if keep_N is None else keep_N[at]
        s_CV = _scratch(s_NV[at], keep_C, triton)
        t_CV = None if t_NV is None else _teacher(t_NV[at], keep_C, triton)
        row = RowStats(*stats[:, at])
        if not triton:
            row = kernels.stats(s_CV, t_CV, ids_N[at], need_grad=True, **options)
        base_C, scale_C, target_C = (None if x is None else x[at] for x in coefficients)
        d_CV = kernels.dlogits(
            s_CV,
            t_CV,
            out_NV[at] if triton else s_CV,
            ids_N[at],
            row,
            base_C=base_C,
            scale_C=scale_C,
            target_C=target_C,
            **options,
        )
        if not triton:
            out_NV[at] = d_CV
    if triton and keep_N is not None:
        out_NV[~keep_N] = 0.0  # an unused row may hold NaN, and 0 * NaN is NaN
    return out_NV


@torch.library.custom_op("minidistill_kernels::row_logprob", mutates_args=())
def logprob_op(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy, each (N,), and the row statistics."""
    keep_N, safe_N = _usable(ids, logits.shape[1], None)
    stats = _stats_of(logits, None, safe_N, keep_N, temperature)
    row = RowStats(*stats)
    return row.logp.clone(), row.entropy.clone(), stats


@logprob_op.register_fake
def _logprob_fake(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    one = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return one, torch.empty_like(one), one.new_empty(len(RowStats._fields), logits.shape[0])


@torch.library.custom_op("minidistill_kernels::row_logprob_backward", mutates_args=())
def logprob_backward_op(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    keep_N, safe_N = _usable(ids, logits.shape[1], None)
    base_N = torch.zeros_like(stats[0]) if d_logp is None else -d_logp
    scale_N = None if d_entropy is None else -d_entropy
    return _dlogits_of(logits, None, safe_N, keep_N, stats, temperature, base_N, scale_N, d_logp)


@logprob_backward_op.register_fake
def _logprob_backward_fake(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, ids, output[2])
    ctx.set_materialize_grads(False)


def _logprob_backward(ctx: Any, d_logp: Any, d_entropy: Any, _: Any) -> tuple[Any, ...]:
    if d_logp is None and d_entropy is None:
        return None, None, None
    logits, ids, stats = ctx.saved_tensors
    return logprob_backward_op(logits, ids, stats, d_logp, d_entropy, ctx.temperature), None, None


logprob_op.register_autograd(_logprob_backward, setup_context=_logprob_setup)


@torch.library.custom_op("minidistill_kernels::row_kl", mutates_args=())
def kl_op(
    s_logits: Tensor, t_logits: Tensor, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL, (N,), and the row statistics."""
    ids_N = torch.zeros(s_logits.shape[0], dtype=torch.int64, device=s_logits.device)
    stats = _stats_of(s_logits, t_logits, ids_N, valid, temperature)
    return RowStats(*stats).kl.clamp(min=0.0), stats


@kl_op.register_fake
def _kl_fake(
    s_logits: Tensor, t_logits: Tensor, valid: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    one = s_logits.new_empty(s_logits.shape[0], dtype=torch.float32)
    return one, one.new_empty(len(RowStats._fields), s_logits.shape[0])


@torch.library.custom_op("minidistill_kernels::row_kl_backward", mutates_args=())
def kl_backward_op(
    s_logits: Tensor,
    t_logits: Tensor,
    stats: Tensor,
    d_kl: Tensor,
    valid: Tensor | None,
    temperature: float,
) -> Tensor:
    ids_N = torch.zeros(s_logits.shape[0], dtype=torch.int64, device=s_logits.device)
    zero = torch.zeros_like(d_kl)
    return _dlogits_of(s_logits, t_logits, ids_N, valid, stats, temperature, zero, d_kl, None)


@kl_backward_op.register_fake
def _kl_backward_fake(s_logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(s_logits, memory_format=torch.contiguous_format)


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    s_logits, t_logits, valid, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(s_logits, t_logits, valid, output[1])


def _kl_backward(ctx: Any, d_kl: Tensor, _: Any) -> tuple[Any, ...]:
    s_logits, t_logits, valid, stats = ctx.saved_tensors
    grad = kl_backward_op(s_logits, t_logits, stats, d_kl, valid, ctx.temperature)
    return grad, None, None, None


kl_op.register_autograd(_kl_backward, setup_context=_kl_setup)
