"""Attention in a row that holds many sequences and each prompt once, without a mask of the row.

`register` gives transformers an implementation named `varlen`. It runs torch's variable-length
flash kernel on keys that are gathered for each segment, or SDPA on one block of the row after the
other where the kernel cannot run (a CPU, fp32). Without either it is transformers' SDPA with its
mask.

Shapes: `_T` tokens of the row, `_A` heads, `_D` head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
from minidistill.trainer.shared_row import Segment, Span

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the scores: caps, sinks, biases."""
PARTIAL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""Attention that also returns its log-sum-exps, with which parts are added up."""
MIN_PREFIX = 512
"""Tokens of a cached prefix from which attending to it on its own saves time."""


def register() -> None:
    """Make `attn_implementation = "varlen"` known to transformers."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, padding_mask)


def gathered_arguments(
    segments: Sequence[Segment], prefix: int, device: torch.device
) -> dict[str, Tensor | int]:
    """Arguments of a forward pass on a row whose keys are gathered: see `GatheredKeys`.

    The names are transformers', so `flash_attention_2` reads them too. The cumulative lengths are
    int32.
    """
    queries = [len(segment) for segment in segments]
    keys = [prefix + _length(_keys(segment)) for segment in segments]
    cumulative = torch.tensor([[0, *queries], [0, *keys]]).cumsum(1, dtype=torch.int32).to(device)
    return {
        "cu_seq_lens_q": cumulative[0],
        "cu_seq_lens_k": cumulative[1],
        "max_length_q": max(queries),
        "max_length_k": max(keys),
    }


def key_index(segments: Sequence[Segment], prefix: int, device: torch.device) -> Tensor:
    """Where each gathered key comes from, int64, in the prefix followed by the row."""
    parts = []
    for segment in segments:
        parts.append(torch.arange(prefix))
        parts += [torch.arange(prefix + start, prefix + stop) for start, stop in _keys(segment)]
    return torch.cat(parts).to(device)


def _keys(segment: Segment) -> tuple[Span, ...]:
    """What the last token of a segment attends to."""
    return *segment.before, segment.span


def _length(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


class GatheredKeys(DynamicLayer):
    """A layer of a cache that returns the keys and values of each segment, one after the other.

    It does not keep what it returns: a pass holds them for one layer at a time.
    """

    def __init__(self, prefix: tuple[Tensor, Tensor] | None, index_T: Tensor) -> None:
        super().__init__()
        if prefix is not None:
            self.lazy_initialization(*prefix)
            self.keys, self.values = prefix
        self.prefix, self.index_T = prefix, index_T

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (1, heads, gathered, D)."""
        keys, values = key_states, value_states
        if self.prefix is not None:
            keys = torch.cat([self.prefix[0], keys], dim=2)
            values = torch.cat([self.prefix[1], values], dim=2)
        return keys.index_select(2, self.index_T), values.index_select(2, self.index_T)


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring queries of a row that attend to the same keys."""

    queries: Span
    keys: tuple[Span, ...]
    mask: Tensor | None
    """bool, (queries, keys). None if the queries are the keys, in order."""


@dataclass(frozen=True, slots=True)
class Row:
    """The blocks of a row, whose keys begin with those of `prefix` cached tokens."""

    prefix: int
    blocks: list[Block]


def blocks(segments: Sequence[Segment], prefix: int, device: torch.device) -> Row:
    """The blocks of a row after a cached prefix.

    Completions of a prompt are one block as long as they are no longer together than what they
    share, so what is computed for pairs of them and then masked is less than the rest.
    """
    groups: list[list[Segment]] = []
    for segment in segments:
        group = groups[-1] if groups else []
        same = group and segment.before and segment.before == group[-1].before
        if same and segment.stop - group[0].start <= prefix + _length(segment.before):
            group.append(segment)
        else:
            groups.append([segment])
    return Row(prefix, [_block(group, prefix, device) for group in groups])


def _block(group: Sequence[Segment], prefix: int, device: torch.device) -> Block:
    queries = group[0].start, group[-1].stop
    keys = _merged(
        [(0, prefix), *((prefix + a, prefix + b) for a, b in (*group[0].before, queries))]
    )
    rows = queries[1] - queries[0]
    shared = _length(keys) - rows
    if not shared and len(group) == 1:
        return Block(queries, keys, None)
    own = torch.block_diag(*(torch.ones(len(s), len(s)).tril() for s in group)).bool()
    return Block(queries, keys, torch.cat([own.new_ones(rows, shared), own], 1).to(device))


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same positions in as few spans as possible."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


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

    `query` is (1, heads, T, D) if `kwargs` has `row_blocks`, or the arguments of
    `gathered_arguments`. Returns (1, T, heads, D). With `decoding` the queries are one token of
    each row, whose keys it holds (`trainer/decoding.py`). Raises ValueError for attention that is
    not exactly causal: windows, caps, sinks, biases, dropout.
    """
    row, decoding = kwargs.get("row_blocks"), kwargs.get("decoding")
    if decoding is not None:
        _check(module, attention_mask, dropout, decoding.longest, kwargs)
        return decoding.attend(module.layer_idx, query, scaling), None
    if row is None and kwargs.get("cu_seq_lens_q") is None:
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
            raise ValueError("a pass after cached tokens needs a mask or sequence lengths")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    longest = key.shape[2] if row is not None else kwargs["max_length_k"]
    _check(module, attention_mask, dropout, longest, kwargs)
    if row is not None:
        return attend_in_blocks(query, key, value, row, scaling), None
    ends = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    query_TAD, key_TAD, value_TAD = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths = kwargs["max_length_q"], kwargs["max_length_k"]
    return run_kernel(query_TAD, key_TAD, value_TAD, ends, lengths, scaling)[None], None


def _check(
    module: torch.nn.Module,
    mask: Tensor | None,
    dropout: float,
    longest: int,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for inputs that `attend` would ignore."""
    problems = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if mask is not None:
        problems.append("a mask")
    if dropout:
        problems.append("dropout")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        problems.append("attention to later tokens")
    window = kwargs.get("sliding_window")
    if window and window < longest:
        problems.append(f"a window of {window} tokens")
    if problems:
        raise ValueError(f"packed attention without a mask does not support {', '.join(problems)}")


def kernel_runs(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether torch's variable-length flash kernel computes attention with heads of this size, and
    its gradient."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if size % 8 or "scale" not in kernel_arguments():
        return False
    capability = torch.cuda.get_device_capability(device)
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


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float | None
) -> Tensor:
    """Attention by SDPA on one block after the other, (1, T, heads, D)."""
    long = row.prefix >= MIN_PREFIX and query.device.type == "cpu" and PARTIAL is not None
    if long and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _attend_after_prefix(query, key, value, row, scale)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for block in row.blocks:
        start, stop = block.queries
        output = scaled_dot_product_attention(
            query[:, :, start:stop],
            _spans(key, block.keys),
            _spans(value, block.keys),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(output.transpose(1, 2))  # as it is in memory
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_after_prefix(
    query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float | None
) -> Tensor:
    """`attend_in_blocks` in two parts: all queries attend to the prefix at once, then each block to
    the rest of its keys. A block would read a copy of the prefix, widened to all heads."""
    heads, repeats, prefix = key.shape[1], query.shape[1] // key.shape[1], row.prefix

    def attend_to(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output and its log-sum-exps. Heads of the same keys are one head's queries."""
        queries = query.reshape(1, heads, -1, query.shape[-1])
        if mask is not None:
            mask = mask.repeat(repeats, 1)
        output, lse = partial_attention(queries, key, value, mask, scale)
        output = output.float() if output.itemsize < 4 else output
        return output.reshape(query.shape), lse.reshape(query.shape[:-1]).to(output.dtype)

    before, before_lse = attend_to(query, key[:, :, :prefix], value[:, :, :prefix])
    outputs = []
    for block in row.blocks:
        start, stop = block.queries
        own = [(max(start, prefix), stop) for start, stop in block.keys if stop > prefix]
        assert block.mask is not None, "what follows a prefix is masked"
        mask = query.new_zeros(block.mask.shape).masked_fill_(~block.mask, -torch.inf)
        at = slice(start, stop)
        output, lse = attend_to(
            query[:, :, at], _spans(key, own), _spans(value, own), mask[:, prefix:]
        )
        weight = torch.sigmoid(lse - before_lse[:, :, at])[..., None]
        outputs.append(torch.lerp(before[:, :, at], output, weight).transpose(1, 2))
    return torch.cat(outputs, dim=1).to(query.dtype)


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and its log-sum-exps, by `PARTIAL`."""
    assert PARTIAL is not None
    output, lse = PARTIAL(query, keys, values, attn_mask=mask, scale=scale)
    return output, lse


def _spans(states: Tensor, spans: Sequence[Span]) -> Tensor:
    parts = [states[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
