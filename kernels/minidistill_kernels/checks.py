"""Argument checks. Each raises a ValueError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidistill_kernels.head import Head

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("full", "sampled", "top_k")
PADDING_ID = -100


def matrix(name: str, x: Tensor) -> None:
    """Require a plain, non-empty 2-D float tensor whose last dimension is contiguous."""
    if hasattr(x, "full_tensor"):
        raise ValueError(f"{name}: is a DTensor; pass a plain tensor (`{name}.full_tensor()`)")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: dtype {x.dtype}, expected float32, bfloat16 or float16")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} has no rows or no columns")
    if x.stride(1) != 1:
        raise ValueError(f"{name}: last dimension is not contiguous (strides {x.stride()})")


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Require the dtype and device of another argument."""
    if x.dtype != other.dtype:
        raise ValueError(f"{name}: dtype {x.dtype}, but {other_name} is {other.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: on {x.device}, but {other_name} is on {other.device}")


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, but {other_name} has {tuple(other.shape)}"
        )


def per_token(name: str, x: Tensor, rows: int, device: torch.device, kind: str) -> None:
    """Require a vector with one entry per token; `kind` is 'ids', 'float' or 'bool'."""
    if x.dim() != 1 or x.shape[0] != rows:
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected ({rows},)")
    per_entry(name, x, device, kind)


def per_entry(name: str, x: Tensor, device: torch.device, kind: str) -> None:
    dtypes = {"ids": (torch.int64, torch.int32), "float": FLOATS, "bool": (torch.bool,)}[kind]
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, expected {device}")


def head(
    name: str, head: Tensor | Head, hidden_name: str, hidden: Tensor, trainable: bool = False
) -> Head:
    """The head, which must fit (N, H) hidden states and be frozen unless `trainable`."""
    head = Head.of(head)
    weight, bias = head.weight_VH, head.bias_V
    matrix(name, weight)
    like(name, weight, hidden_name, hidden)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}: width {weight.shape[1]}, but {hidden_name} has {hidden.shape[1]}"
        )
    if bias is not None:
        per_token(f"{name}'s bias", bias, weight.shape[0], hidden.device, "float")
    positive(f"{name}'s scale", head.scale)
    if head.cap is not None:
        positive(f"{name}'s cap", head.cap)
    trained = any(x is not None and x.requires_grad for x in (weight, bias))
    if trained and torch.is_grad_enabled() and not trainable:
        raise ValueError(
            f"{name}: requires a gradient, which this function does not compute; "
            f"freeze the head or pass `{name}.detach()`"
        )
    return head


def heads(
    h_s: Tensor,
    weight: Tensor | Head,
    h_t: Tensor | None,
    teacher_weight: Tensor | Head | None,
    names: tuple[str, str, str] = ("h_s_NH", "weight_VH", "h_t_NH"),
    trainable: bool = False,
) -> tuple[Head, Head | None]:
    """The two heads, which must fit their hidden states.

    `names` are those of the first three arguments.
    """
    s_name, w_name, t_name = names
    matrix(s_name, h_s)
    student = head(w_name, weight, s_name, h_s, trainable)
    if h_t is None:
        if teacher_weight is not None:
            raise ValueError(f"teacher_weight: given without {t_name}")
        return student, None
    matrix(t_name, h_t)
    like(t_name, h_t, s_name, h_s)
    if h_t.shape[0] != h_s.shape[0]:
        raise ValueError(f"{t_name}: {h_t.shape[0]} rows, but {s_name} has {h_s.shape[0]}")
    if teacher_weight is None:
        same_shape(t_name, h_t, s_name, h_s)
        return student, None
    teacher = head("teacher_weight", teacher_weight, t_name, h_t)
    rows, needed = teacher.weight_VH.shape[0], student.weight_VH.shape[0]
    if rows != needed:
        raise ValueError(f"teacher_weight: vocabulary of {rows}, but {w_name} has {needed}")
    return student, teacher


def no_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, which is not computed; detach it")


def positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: {value}, expected a finite number above 0")


def finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value}, expected a finite number")


def chunk_size(chunk: int | None) -> int:
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk: {chunk}, expected a whole number of tokens above 0")
    return chunk or 0


def usable_rows(ids: Tensor, vocab: int, valid: Tensor | None) -> Tensor | None:
    """Mask of the rows to compute: valid and not padding (-100). None means all rows.

    It runs inside the opaque op, where reading values does not break torch.compile's graph. It
    synchronizes with the device once.
    """
    keep = ids != PADDING_ID
    if valid is not None:
        keep = keep & valid
    in_range = (ids >= 0) & (ids < vocab)
    keep_all, ids_fit = torch.stack([keep.all(), (in_range | ~keep).all()]).tolist()
    if not ids_fit:
        bad = int(ids[keep & ~in_range][0])
        raise ValueError(f"ids: {bad} is outside the vocabulary of {vocab} (padding is -100)")
    return None if keep_all else keep


def teacher_inputs(
    estimator: str, h_t: Tensor | None, logp: Tensor | None, ids: Tensor | None, top: Tensor | None
) -> None:
    """Require exactly one form of the teacher's scores, one that the estimator can use."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if (ids is None) != (top is None):
        missing = "topk_ids_NK" if ids is None else "teacher_topk_logp_NK"
        raise ValueError(f"{missing}: topk_ids_NK and teacher_topk_logp_NK come together")
    if h_t is not None and (logp is not None or ids is not None):
        extra = "teacher_logp_N" if logp is not None else "topk_ids_NK"
        raise ValueError(f"{extra}: given as well as h_t_NH; the teacher is scored one way")
    if ids is not None and estimator != "top_k":
        raise ValueError(f"topk_ids_NK: not used by estimator {estimator!r}")
    if estimator == "full" and h_t is None:
        raise ValueError("h_t_NH: estimator 'full' needs the teacher's hidden states")
    if estimator == "sampled" and h_t is None and logp is None:
        raise ValueError("teacher_logp_N: estimator 'sampled' needs it, or h_t_NH")
    if estimator == "top_k" and h_t is None and ids is None:
        raise ValueError("topk_ids_NK: estimator 'top_k' needs it, or h_t_NH")


def top_k_inputs(ids: Tensor, logp: Tensor, rows: int, device: torch.device) -> None:
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise ValueError(f"topk_ids_NK: shape {tuple(ids.shape)}, expected ({rows}, K)")
    same_shape("teacher_topk_logp_NK", logp, "topk_ids_NK", ids)
    per_entry("topk_ids_NK", ids, device, "ids")
    per_entry("teacher_topk_logp_NK", logp, device, "float")


def objective_numbers(
    top_k: int, temperature: float, high: float, low: float, mask_high: float, clip: float | None
) -> None:
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}, expected at least 1")
    positive("temperature", temperature)
    positive("ratio_clip_high", high)
    if not 0 <= low <= mask_high:
        raise ValueError(f"token_mask_low: {low}, expected within [0, token_mask_high={mask_high}]")
    if clip is not None:
        positive("kl_clip", clip)
