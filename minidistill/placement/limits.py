"""Sizes that the memory estimate and the engines share."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidistill.config import Config


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as `max_lora_rank`."""
MAX_SEQUENCES = 256
"""Sequences that a vLLM engine decodes at a time."""
CPU_BLOCK = 32
"""Tokens in a KV cache block on a CPU: the smallest block that vLLM accepts."""
CPU_CACHE_BYTES = 2 << 30
"""Largest KV cache of a vLLM engine on a CPU."""
EMBEDDED_CACHE_BYTES = 2 << 30
"""The largest KV cache of the sequences that the embedded engine decodes at a time on a CPU. On a
GPU it takes half of what is free."""
PACKED_SHARE = 0.125
"""Of a CPU's memory: the largest copy of the weights that the embedded engine samples with."""
MICRO_BATCH_TOKENS = 16384
"""Tokens of the largest micro-batch that is chosen. More make no pass faster."""
CPU_MICRO_BATCH_TOKENS = 1024
"""The same on a CPU, unless a group of rollouts with one prompt has more."""
SYNC_CHUNK_BYTES = 256 << 20
"""The trainer's buffer for a sync of all weights. A larger tensor is sent alone."""


def completion_tokens(config: Config, max_length: int) -> int:
    """Tokens that are sampled for a rollout at most: of a conversation, those of all its turns.

    How many turns there are is read from `max_turns`, if an environment's args name it.
    """
    turns = [env.args.get("max_turns", 1) for env in config.orchestrator.env]
    most = max([1, *(number for number in turns if type(number) is int)])
    return min(most * config.orchestrator.sampling.max_tokens, max_length - 1)


def fp32_copy_bytes(itemsize: int) -> int:
    """Bytes of the fp32 copy that the trainer keeps of a trained weight, and of its moving average.

    A weight of `itemsize` bytes in half precision has one: small updates would be lost in it.
    """
    return 4 if itemsize < 4 else 0


def head_size(text_config: Any) -> int:
    """The width of one attention head, from the configuration of a model's text part."""
    size = getattr(text_config, "head_dim", None)
    return int(size or text_config.hidden_size // text_config.num_attention_heads)


def kv_bytes_per_token(model_config: Any, itemsize: int, tp: int = 1) -> int:
    """Bytes of one token's keys and values on one of `tp` GPUs. Heads are not split."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    per_gpu = max(Fraction(1), Fraction(kv_heads, tp))
    return int(2 * text.num_hidden_layers * per_gpu * head_size(text) * itemsize)


def cpu_cache_bytes(kv_bytes: int, max_length: int) -> int:
    """Bytes of a vLLM engine's KV cache on a CPU: room for a full batch, within bounds.

    `kv_bytes` is the size of one token, `max_length` the engine's longest sequence in tokens.
    """
    blocks = -(-max_length // CPU_BLOCK)
    one_sequence = blocks * CPU_BLOCK * kv_bytes
    return max(one_sequence + (64 << 20), min(MAX_SEQUENCES * one_sequence, CPU_CACHE_BYTES))


def longest_sequence(model_config: Any, tokens: int) -> int:
    """`tokens`, or the model's own limit if that is lower."""
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or tokens
    return min(tokens, limit)
