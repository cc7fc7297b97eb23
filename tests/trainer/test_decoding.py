"""Decoding in place: the log-probs of plain passes, wherever keys and values are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.packed_attention import PACKED, random_rows, tiny_config, tiny_model, tiny_policy
from support.plain_forward import completion_logprobs

from minidistill.engines.embedded import EmbeddedEngine
from minidistill.placement.attention import KNOWN_TYPES
from minidistill.trainer import decoding
from minidistill.trainer.decoding import Decoding, in_place
from minidistill.trainer.forward import PrefixCache, prefix_states, seeded_cache
from minidistill.types import Completion, Request, Role, SamplingParams

PREFIX = random_rows((9,), 1)[0]
# groups of 3, 1, 4 and 2 rows, whose prompts differ in length
COPIES = [3, 1, 4, 2]
PROMPTS = [tuple(row) for row in random_rows((5, 1, 7, 3), 2, PREFIX)]
REQUESTS = [
    Request(prompt, 10 * g + i)
    for g, prompt in enumerate(PROMPTS)
    for i in range(COPIES[g])
]  # fmt: skip
ENDS = frozenset(range(1, 7))  # of 50 tokens: rows leave at different steps
WIDTH = len(PREFIX) + 7
STORED = {
    "prompts and prefix once": 0,
    "prompts once": (sum(COPIES) - len(COPIES)) * WIDTH,
    "prefix once": (sum(COPIES) - len(COPIES)) * WIDTH + 1,
    "rows alone": 10**6,
}
"""The least saved tokens for which something is stored once."""


def sampled(kind: str, attention: str = "varlen") -> list[Completion]:
    policy = tiny_policy(tiny_model(tiny_config(kind), attention), PACKED)
    policy.eos_ids = ENDS
    engine = EmbeddedEngine(policy, PrefixCache(policy, shares=True))
    return engine.generate(REQUESTS, SamplingParams(14), Role.STUDENT)


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
def test_logprobs_are_those_of_plain_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(kind), "sdpa")
    expected = sampled(kind, "sdpa")
    lengths = {len(completion.token_ids) for completion in expected}
    assert len(lengths) > 3, "the rows end together"
    for saved in STORED.values():
        monkeypatch.setattr(decoding, "MIN_SAVED", saved)
        completions = sampled(kind)
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        for request, completion in zip(REQUESTS, completions, strict=True):
            logp = completion_logprobs(model, request.prompt_ids, completion.token_ids)
            assert completion.logprobs == pytest.approx(logp.tolist(), abs=2e-6)


def decoding_after_prompts(kind: str) -> tuple[Any, Decoding]:
    """A policy, and the decoding of three prompts of one length with 3, 1 and 4 rows."""
    policy = tiny_policy(tiny_model(tiny_config(kind), "varlen"), PACKED)
    states = prefix_states(policy, PREFIX)
    cache = seeded_cache(policy, states, 3)
    ids = torch.tensor(random_rows((4, 4, 4), 5))
    mask, positions = torch.ones(3, 13, dtype=torch.bool), torch.arange(9, 13).expand(3, -1)
    policy.body(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return policy, Decoding(cache, COPIES[:3], None, states, 6)


@torch.no_grad()
def test_each_prompt_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MIN_SAVED", 0)
    _, kept = decoding_after_prompts("llama")
    prefix, prompts = (shared.states for shared in kept.shared)
    assert [tuple(x.shape) for x in prefix[0]] == [(1, 2, 9, 8)] * 2
    assert [tuple(x.shape) for x in prompts[0]] == [(3, 2, 4, 8)] * 2
    # and nothing else is kept alive by them
    assert [x.untyped_storage().nbytes() for x in prompts[0]] == [3 * 2 * 4 * 8 * 8] * 2
    assert tuple(kept.cache.layers[0].keys.shape) == (8, 2, 6, 8)
    monkeypatch.setattr(decoding, "PARTIAL", None)  # another torch
    _, apart = decoding_after_prompts("llama")
    assert not apart.shared
    assert tuple(apart.cache.layers[0].keys.shape) == (8, 2, 19, 8)


@torch.no_grad()
@pytest.mark.parametrize("saved", STORED.values(), ids=STORED)
def test_rows_leave_without_a_copy_of_the_cache(
    saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that stay give what they would have given, in the same buffers."""
    monkeypatch.setattr(decoding, "MIN_SAVED", saved)
    policy, all_rows = decoding_after_prompts("qwen3")
    _, leaving = decoding_after_prompts("qwen3")
    tokens = torch.tensor(random_rows((5,) * 8, 6))
    stay = [[0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 4, 6], [0, 2, 4], [1]]
    rows, buffers = list(range(8)), [layer.keys.data_ptr() for layer in leaving.cache.layers]
    for step in range(5):
        together, alone = (
            policy.body(
                input_ids=tokens[chosen, step : step + 1],
                position_ids=torch.full((len(chosen), 1), 13 + step),
                past_key_values=kept.cache,
                decoding=kept,
            ).last_hidden_state
            for chosen, kept in ((list(range(8)), all_rows), (rows, leaving))
        )
        torch.testing.assert_close(alone, together[rows], rtol=1e-9, atol=1e-9)
        if step < len(stay):
            rows = [rows[i] for i in leaving.keep(stay[step])]
    assert [layer.keys.data_ptr() for layer in leaving.cache.layers] == buffers


def test_few_rows_move() -> None:
    assert in_place([0, 1, 2]) == [0, 1, 2]
    assert in_place([0, 3, 4]) == [0, 3, 4]
    assert in_place([1, 2, 5, 6]) == [5, 1, 2, 6]
    assert in_place([7]) == [7]
