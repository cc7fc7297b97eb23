"""Decoding in place in bf16, on a GPU or rehearsed on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gpus import DEVICE
from support.packed_attention import PACKED, random_rows, tiny_config, tiny_model, tiny_policy

from minidistill.engines.embedded import EmbeddedEngine
from minidistill.trainer import decoding
from minidistill.trainer.forward import PrefixCache
from minidistill.types import Request, Role, SamplingParams

pytestmark = pytest.mark.gpu


def largest_error(model: Any, requests: list[Request]) -> float:
    """Of the log-probs of what is sampled, against plain passes in float64."""
    policy = tiny_policy(model, PACKED)
    policy.eos_ids = frozenset(range(1, 7))  # rows leave at different steps
    engine = EmbeddedEngine(policy, PrefixCache(policy, shares=True))
    engine.steps_per_check = 4
    completions = engine.generate(requests, SamplingParams(12), Role.STUDENT)
    exact = tiny_model(model.config, "sdpa", torch.float32)
    exact.load_state_dict({name: x.cpu() for name, x in model.state_dict().items()})
    errors = []
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        logp = exact.double()(input_ids=ids).logits[0].log_softmax(-1)
        start = len(request.prompt_ids)
        for i, (token, ours) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        ):
            errors.append(abs(float(logp[start + i - 1, token]) - ours))
    return max(errors)


@torch.no_grad()
def test_bf16_logprobs_are_near_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts stored once (which only a CPU does) add no error to that of bf16."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64}
    model = tiny_model(tiny_config("qwen3", **sizes), "varlen", torch.bfloat16).to(DEVICE)
    prompts = random_rows((30, 1, 7), 2, random_rows((40,), 1)[0])
    requests = [Request(tuple(p), 10 * g + i) for g, p in enumerate(prompts) for i in range(3)]
    monkeypatch.setattr(decoding, "MIN_SAVED", 10**6)
    apart = largest_error(model, requests)
    monkeypatch.setattr(decoding, "MIN_SAVED", 0)
    once = largest_error(model, requests)
    assert apart < 0.05
    assert once < 1.5 * apart + 0.005
