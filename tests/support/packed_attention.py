"""Small models for packed passes, and a stand-in for the kernel that only runs on a GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from minidistill.placement.attention import VARLEN, Attention
from minidistill.trainer import attention, forward
from minidistill.trainer.policy import Policy

PACKED, PADDED = Attention(VARLEN, packed=True), Attention(VARLEN, packed=False)
TINY = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip


def tiny_config(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig

    experts = EXPERTS if "moe" in kind or kind == "mixtral" else {}
    window = {"sliding_window": None} if kind in ("mistral", "phi3") else {}
    return AutoConfig.for_model(kind, **{**TINY, **experts, **window, **more})


def tiny_model(model_config: Any, implementation: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model, the same for the same configuration whatever the attention."""
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    experts = hasattr(model_config, "num_experts_per_tok")
    options = {"experts_implementation": "eager"} if experts else {}
    return AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, attn_implementation=implementation, **options
    ).eval()


def tiny_policy(model: Any, how: Attention) -> Policy:
    device = next(model.parameters()).device
    policy = Policy(model, SimpleNamespace(pad_token_id=0), frozenset({1}), device)
    policy.attention = how
    return policy


def random_rows(lengths: Sequence[int], seed: int, prefix: Sequence[int] = ()) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, 50, (n,), generator=generator).tolist()  # noqa: E731
    return [[*prefix, *draw(length)] for length in lengths]


def plain_attention(
    query_TAD: Tensor,
    key_TAD: Tensor,
    value_TAD: Tensor,
    ends_q: Sequence[int],
    ends_k: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Softmax attention from its formula. The last query of a sequence attends to all its keys."""
    repeats = query_TAD.shape[1] // key_TAD.shape[1]
    key_TAD, value_TAD = (x.repeat_interleave(repeats, 1) for x in (key_TAD, value_TAD))
    scale = 1 / math.sqrt(query_TAD.shape[2]) if scale is None else scale
    outputs = []
    for (q_start, q_end), (k_start, k_end) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        query, keys = query_TAD[q_start:q_end], slice(k_start, k_end)
        scores = torch.einsum("qad,kad->aqk", query, key_TAD[keys]) * scale
        later = torch.arange(k_end - k_start) > torch.arange(q_end - q_start)[:, None] + (
            (k_end - k_start) - (q_end - q_start)
        )
        weights = scores.masked_fill(later.to(scores.device), -math.inf).softmax(-1)
        outputs.append(torch.einsum("aqk,kad->qad", weights, value_TAD[keys]))
    return torch.cat(outputs)


class KernelCalls:
    """Stands in for torch's `varlen_attn` where there is no GPU, and records its calls.

    A call that the installed torch's function would not take fails. `without` is an argument that
    this stand-in does not take: torch 2.11 has no `enable_gqa`.
    """

    def __init__(self, patch: pytest.MonkeyPatch, without: str = "") -> None:
        self.calls: list[dict[str, Any]] = []
        self.signature = inspect.signature(varlen.varlen_attn)
        self.names = names = frozenset(self.signature.parameters) - {without}
        patch.setattr(attention, "varlen_attn", self)
        patch.setattr(attention, "kernel_arguments", lambda: names)
        patch.setattr(forward, "kernel_runs", lambda device, dtype, size: True)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        self.calls.append({**given, "named": set(kwargs)})
        assert given["window_size"] == (-1, 0), "the attention is not causal"
        ends = given["cu_seq_q"], given["cu_seq_k"]
        for cumulative, longest in zip(ends, (given["max_q"], given["max_k"]), strict=True):
            assert cumulative.dtype == torch.int32
            assert int(cumulative.diff().max()) == longest
        for tensor in (given["query"], given["key"], given["value"]):
            assert tensor.ndim == 3
            assert tensor.stride(-1) == 1, "the kernel reads heads from contiguous memory"
        exact = [given[name].double() for name in ("query", "key", "value")]
        output = plain_attention(*exact, ends[0].tolist(), ends[1].tolist(), given["scale"])
        return output.to(given["query"].dtype)
