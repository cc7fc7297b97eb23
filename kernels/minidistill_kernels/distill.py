"""The objective of distillation for each token, from hidden states and the LM head.

Legend: _N tokens, _H hidden, _V vocabulary, _K ids per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidistill_kernels import checks
from minidistill_kernels.head import Head
from minidistill_kernels.objective import DistillOutput
from minidistill_kernels.op import head_arguments, linear_op


def linear_distill(
    h_s_NH: Tensor,
    weight_VH: Tensor | Head,
    ids_N: Tensor,
    *,
    h_t_NH: Tensor | None = None,
    teacher_weight: Tensor | Head | None = None,
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
        top_k    the same sum over the student's k most likely ids and one bucket for the rest
        sampled  -rho [adv_tau A + teacher_tau log q(y) - student_tau log pi(y)] log pi(y),
                 the bracket detached (the policy-gradient form of the reverse KL: Lu et al.,
                 "On-Policy Distillation", 2025)

    Tokens whose pi(y) / mu(y) is outside [token_mask_low, token_mask_high] get no loss and no
    gradient. `kl_clip` bounds the distillation term: in `sampled` it is clamped to +-kl_clip,
    otherwise scaled down to kl_clip. Memory is bounded by the logits of `chunk` tokens.

    Args:
        h_s_NH: (N, H) student's hidden states; float32, bfloat16 or float16. Differentiable.
        weight_VH: (V, H) head, same dtype; a `Head` if its logits have a bias, a scale or a soft
            cap. If it requires a gradient, that is accumulated in fp32, and the loss must be
            reduced by a sum or a mean.
        ids_N: (N,) sampled tokens, int64 or int32; -100 is padding.
        h_t_NH: (N, H) teacher's hidden states, same dtype; detached.
        teacher_weight: (V, H) the teacher's own head, or its `Head`, if it is not the student's.
            With it the teacher's hidden states may have another width.
        teacher_logp_N: (N,) log q(y), scored elsewhere; for `sampled` without `h_t_NH`.
        topk_ids_NK: (N, K) distinct ids, the student's most likely; for `top_k` without `h_t_NH`.
        teacher_topk_logp_NK: (N, K) log q at `topk_ids_NK`, scored elsewhere.
        advantage_N: (N,) A, centered; None is 0.
        sampler_logp_N: (N,) log mu(y); None makes rho 1.
        estimator: "full" (needs `h_t_NH`), "sampled" or "top_k".
        top_k: k of `top_k` with `h_t_NH`.
        valid: (N,) bool; rows that are False are not computed.
        chunk: tokens at a time; None fits 32 MiB of fp32 logits on a CPU, 1 GiB on CUDA.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, has no rows, requires a gradient
            that is not computed (a teacher's head), or an id is out of range.
        RuntimeError: in the backward pass, the head requires a gradient, and the upstream gradient
            is not the same for all tokens.
    """
    n = h_s_NH.shape[0]
    head, teacher_head = checks.heads(h_s_NH, weight_VH, h_t_NH, teacher_weight, trainable=True)
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
        temperature / head.scale,
        ratio_clip_high,
        token_mask_low,
        token_mask_high,
    )
    constants = (
        advantage_N,
        sampler_logp_N,
        teacher_logp_N,
        topk_ids_NK,
        teacher_topk_logp_NK,
        valid,
    )
    grad = torch.is_grad_enabled()
    train_head = grad and any(x is not None and x.requires_grad for x in head[:2])
    loss, metrics, flags, *_ = linear_op(
        h_s_NH,
        head.weight_VH,
        ids_N,
        *head_arguments(head, h_t_NH, teacher_head),
        *(None if x is None else x.detach() for x in constants),
        estimator,
        top_k,
        [float(x) for x in settings],
        None if kl_clip is None else float(kl_clip),
        checks.chunk_size(chunk),
        train_head or (grad and h_s_NH.requires_grad),
        train_head,
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
