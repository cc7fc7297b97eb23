"""Probes of a model: how far what a run does with it is from each sequence alone.

Shapes: `_N` tokens, `_H` hidden, `_V` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minidistill.engines.embedded import EmbeddedEngine
from minidistill.placement.attention import Layout
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import PrefixCache, hidden_states
from minidistill.trainer.policy import Policy
from minidistill.types import Completion, Request, Role, SamplingParams

Ids = tuple[int, ...]
TOKENS = 6  # of a sample
SHORTEST = 8  # tokens of a prompt for a probe; a shorter one is repeated
LONGEST = 256  # tokens of a prompt for a probe, unless the model has a window
LONGEST_WINDOW = 2048  # that a probe still goes beyond
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


def probe_ids(policy: Policy, prompt: Ids) -> Ids:
    """A prompt for a probe: of a few tokens at least, and long enough for the model's window.

    What a probe finds does not depend on the length, and what it costs does.
    """
    text = policy.config.get_text_config()
    windows = [w for name in WINDOWS if isinstance(w := getattr(text, name, None), int)]
    longest = max([LONGEST, *(w + SHORTEST for w in windows if w <= LONGEST_WINDOW)])
    return (prompt * SHORTEST)[: min(longest, max(SHORTEST, len(prompt)))]


def other_ids(policy: Policy, ids: Ids) -> Ids:
    """As many other tokens. They are from the first half of the vocabulary, because a multimodal
    model's image tokens are at its end."""
    half = max(2, policy.head_VH.shape[0] // 2)
    return tuple((id + 1) % half for id in ids)


def own_logprobs(policy: Policy, prompt: Ids, completion: Ids) -> Tensor:
    """The model's own log-probs at a completion's positions, (len(completion), vocabulary) fp32.

    The model is asked for the last logits only: all of them may be gigabytes.
    """
    needed = len(completion) + 1
    parameters = inspect.signature(policy.causal.forward).parameters
    options = {"logits_to_keep": needed} if "logits_to_keep" in parameters else {}
    ids_BL = torch.tensor([[*prompt, *completion]], device=policy.device)
    logits_BLV = policy.causal(input_ids=ids_BL, use_cache=False, **options).logits
    return logits_BLV[0, -needed:-1].float().log_softmax(-1)


def mean_difference(ours_NV: Tensor, own_NV: Tensor) -> float:
    """The mean difference of two distributions' log-probs, at the token where it is largest.

    Each weighs as much as the larger of its probabilities, so that what neither would sample does
    not count.
    """
    weights_NV = torch.maximum(ours_NV, own_NV).exp()
    return float((weights_NV * (ours_NV - own_NV).abs()).sum(-1).max())


def attention_error(policy: Policy, ids: Ids) -> float:
    """The largest difference of log-probs between the model's attention and its eager one.

    Eager attention is the model's own code. Others may leave out what they do not know.
    """
    ids, model = probe_ids(policy, ids), policy.causal
    chosen = model.config._attn_implementation
    prompt, completion = ids[:1], ids[1:]
    logp_NV = own_logprobs(policy, prompt, completion)
    model.set_attn_implementation("eager")
    try:
        eager_NV = own_logprobs(policy, prompt, completion)
    finally:
        model.set_attn_implementation(chosen)
    # log-probs of tokens with negligible probability carry no information
    return float(((logp_NV - eager_NV).abs() * eager_NV.exp()).max())


def largest_leak(policy: Policy, first: Ids, second: Ids, layout: Layout) -> float:
    """How much `second`'s hidden states change if `first`, in the same batch, has other tokens.

    Relative to the largest hidden state. It is 0 if no sequence reads another, whatever the dtype:
    the passes have the same shapes. Only experts, whose batches depend on all tokens, round
    differently.
    """
    first, second = probe_ids(policy, first), probe_ids(policy, second)

    def states(first: Ids) -> Tensor:
        # every position but the last, as those of a completion
        prompts, completions = [first[:1], second[:1]], [first[1:], second[1:]]
        tokens = collate(prompts, completions, pad_id=policy.pad_id, layout=layout)
        return hidden_states(policy, tokens)[len(first) - 1 :].float()

    before_NH, after_NH = states(first), states(first[:1] + other_ids(policy, first)[1:])
    return float((after_NH - before_NH).abs().max() / before_NH.abs().max())


def sampling_error(policy: Policy, prompts: Sequence[Ids], role: Role, shares: bool) -> float:
    """The `kl/sampler_mismatch` of completions that the trainer's model samples.

    They are the first prompt and a shorter part of the last, so that there is padding, and two
    others that begin like them. Each is read once for two completions. They are sampled once
    without an end, and once with ends at which rows leave the batch one by one.
    """
    with policy.running_as(role):
        first, last = (probe_ids(policy, prompt) for prompt in (prompts[0], prompts[-1]))
        shorter = last[: 3 * min(len(first), len(last)) // 4]
        others = [
            ids[: len(ids) // 2] + other_ids(policy, ids[len(ids) // 2 :])
            for ids in (first, shorter)
        ]
    requests = [Request(prompt, seed) for prompt in (first, shorter, *others) for seed in range(2)]

    def sample(ends: frozenset[int]) -> list[Completion]:
        until = replace(policy, eos_ids=ends)
        engine = EmbeddedEngine(until, PrefixCache(until, shares))
        engine.steps_per_check = 1  # on a GPU too, rows leave within the few tokens of a probe
        return engine.generate(requests, SamplingParams(TOKENS), role)

    endless = sample(frozenset())
    later = {c.token_ids[1 + i % (TOKENS - 1)] for i, c in enumerate(endless[::2])}
    ended = sample(frozenset(later - {c.token_ids[0] for c in endless}))
    logp, sampler = [], []
    with policy.inference(), policy.running_as(role):
        for request, *samples in zip(requests, endless, ended, strict=True):
            read: Ids = ()
            for completion in samples:  # the second is how the first begins, unless something fails
                ids = completion.token_ids
                if ids != read[: len(ids)]:
                    read, own_NV = ids, own_logprobs(policy, request.prompt_ids, ids)
                ids_N = torch.tensor(ids, device=policy.device)
                logp.append(own_NV[: len(ids)].gather(1, ids_N[:, None])[:, 0].cpu())
                sampler.append(torch.tensor(completion.logprobs))
    log_ratio_N = (torch.cat(logp) - torch.cat(sampler)).double()
    return float((log_ratio_N.exp() - 1 - log_ratio_N).mean())
