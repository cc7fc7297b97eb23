"""A limit on how far a request reads vLLM's prefix cache, in vLLM's process.

vLLM returns no log-probs for cached positions, so a request for the log-probs of a completion must
compute its last prompt token and what follows. Otherwise the samples of a prompt whose length is a
multiple of the block size would find all of it in the cache, and those that begin alike even more.
vLLM can only skip the cache as a whole, and then reads the context again for every sample.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager

KEY = "minidistill_cached_tokens"


def arguments(tokens: int) -> dict[str, int]:
    """The `extra_args` of a request that reads at most `tokens` tokens from the cache."""
    return {KEY: tokens}


class _Shortened:
    """A request as the lookup sees it: vLLM leaves at least the last token to be computed."""

    def __init__(self, request: Any, tokens: int) -> None:
        self._request, self.num_tokens = request, min(request.num_tokens, tokens + 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


_get_computed_blocks = KVCacheManager.get_computed_blocks


def _limited(self: KVCacheManager, request: Any) -> Any:
    extra = request.sampling_params.extra_args if request.sampling_params else None
    if extra and KEY in extra:
        request = _Shortened(request, extra[KEY])
    return _get_computed_blocks(self, request)


KVCacheManager.get_computed_blocks = _limited  # type: ignore[method-assign]
