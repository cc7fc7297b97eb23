"""Attention to packed sequences without a mask.

`register` gives transformers an implementation named `varlen`. With the lengths of the sequences in
a row it runs torch's variable-length flash kernel, or SDPA on one sequence after the other where
the kernel cannot run (a CPU, fp32). Without lengths it is transformers' SDPA with its mask.

Shapes: `_T` tokens of all sequences, `_A` heads, `_D` head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minidistill.placement.attention import VARLEN

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the scores: caps, sinks, biases."""


def register() -> None:
    """Make `attn_implementation = "varlen"` known to transformers."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, padding_mask)


def sequence_arguments(
    lengths: Sequence[int], prefix: int, device: torch.device
) -> dict[str, Tensor | int]:
    """Arguments of a forward pass that say where each sequence of a packed row begins and ends.

    Each sequence has `lengths` new tokens after a cached prefix of `prefix` tokens. The names are
    transformers', so `flash_attention_2` reads them too. The cumulative lengths are int32.
    """
    sizes = torch.tensor([[0, *lengths], [0, *(prefix + n for n in lengths)]])
    cumulative = sizes.cumsum(1, dtype=torch.int32).to(device)
    return {
        "cu_seq_lens_q": cumulative[0],
        "cu_seq_lens_k": cumulative[1],
        "max_length_q": max(lengths),
        "max_length_k": prefix + max(lengths),
    }


class PackedPrefix(DynamicLayer):
    """A layer of a cache that puts a prefix's keys and values before those of each sequence.

    It does not keep what it returns: a pass holds them for one layer at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor, index_T: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.prefix, self.index_T = (keys, values), index_T

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, T, D) of all sequences, each with the prefix."""
        keys, values = (
            torch.cat([prefix, new], dim=2).index_select(2, self.index_T)
            for prefix, new in zip(self.prefix, (key_states, value_states), strict=True)
        )
        return keys, values


def prefix_index(lengths: Sequence[int], prefix: int, device: torch.device) -> Tensor:
    """Where each key of a packed row comes from, int64, in the prefix followed by the row."""
    ends = torch.tensor(lengths).cumsum(0) + prefix
    shared = torch.arange(prefix)
    parts = [
        part
        for end, length in zip(ends.tolist(), lengths, strict=True)
        for part in (shared, torch.arange(end - length, end))
    ]
    return torch.cat(parts).to(device)


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of a padded pass, as for SDPA. A packed pass has no padding mask and gets none."""
    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    return mask


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    `query` is (1, heads, T, D) if `kwargs` has the arguments of `sequence_arguments`; each query
    then attends to the keys of its sequence up to itself. Returns (1, T, heads, D). Raises
    ValueError for attention that is not exactly this: windows, caps, sinks, biases, dropout.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            raise ValueError("a pass after cached tokens needs a mask or sequence lengths")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check(module, attention_mask, dropout, kwargs)
    ends = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    if kernel_runs(query, value):
        longest = kwargs["max_length_q"], kwargs["max_length_k"]
        query_TAD, key_TAD, value_TAD = (x[0].transpose(0, 1) for x in (query, key, value))
        output_TAD = run_kernel(query_TAD, key_TAD, value_TAD, ends, longest, scaling)
        return output_TAD[None], None
    return one_by_one(query, key, value, ends, scaling).transpose(1, 2), None


def _check(
    module: torch.nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raise ValueError for what `attend` would leave out."""
    problems = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if mask is not None:
        problems.append("a mask")
    if dropout:
        problems.append("dropout")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        problems.append("attention to later tokens")
    window = kwargs.get("sliding_window")
    if window and window < kwargs["max_length_k"]:
        problems.append(f"a window of {window} tokens")
    if problems:
        raise ValueError(f"packed attention without a mask does not support {', '.join(problems)}")


def kernel_runs(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length flash kernel computes this attention and its gradient."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if size % 8 or value.shape[-1] != size or "scale" not in kernel_arguments():
        return False
    capability = torch.cuda.get_device_capability(query.device)
    # of heads larger than 192, cards with little shared memory cannot run the backward pass
    return capability >= (8, 0) and size <= (256 if capability in ((8, 0), (9, 0)) else 192)


@cache
def kernel_arguments() -> frozenset[str]:
    """The arguments of the installed torch's `varlen_attn`."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def run_kernel(
    query_TAD: Tensor,
    key_TAD: Tensor,
    value_TAD: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Causal attention within each sequence, aligned to the last query and key, (T, A, D).

    Keys and values may have fewer heads: torch 2.11 takes them as they are, later ones on request.
    """
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in kernel_arguments() else {}
    output = varlen_attn(
        query_TAD, key_TAD, value_TAD, *ends, *longest,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(output, Tensor)  # not with its log-sum-exps
    return output


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: tuple[Tensor, Tensor],
    scale: float | None,
) -> Tensor:
    """The same attention by SDPA on one sequence after the other, (1, heads, T, D).

    Only queries after a cached prefix need a mask: SDPA aligns to the first query and key.
    """
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    spans = [list(pairwise(cumulative.tolist())) for cumulative in ends]
    for (q_start, q_end), (k_start, k_end) in zip(*spans, strict=True):
        queries, keys = q_end - q_start, k_end - k_start
        mask = None
        if keys > queries > 1:
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = allowed.tril(keys - queries)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, q_start:q_end],
                key[:, :, k_start:k_end],
                value[:, :, k_start:k_end],
                attn_mask=mask,
                is_causal=queries == keys,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2)
