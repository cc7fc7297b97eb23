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
PROMPTS = 2  # to sample from, and as many others of their lengths
TOKENS = 6  # of a sample
PROBE_TOKENS = 256  # of a sequence, at most


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


def attention_error(policy: Policy, ids: Ids) -> float:
    """The largest difference of log-probs between the model's attention and its eager one.

    Eager attention is the model's own code. Others may leave out what they do not know.
    """
    ids, model = ids[:PROBE_TOKENS], policy.causal
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
    the passes have the same shapes. Only experts, whose batches depend on all tokens, round anew.
    """
    first, second = first[:PROBE_TOKENS], second[:PROBE_TOKENS]

    def states(first: Ids) -> Tensor:
        # every position but the last, as those of a completion
        prompts, completions = [first[:1], second[:1]], [first[1:], second[1:]]
        tokens = collate(prompts, completions, pad_id=policy.pad_id, layout=layout)
        return hidden_states(policy, tokens)[len(first) - 1 :].float()

    before_NH, after_NH = states(first), states(first[:1] + first[:0:-1])
    return float((after_NH - before_NH).abs().max() / before_NH.abs().max())


def sampling_error(policy: Policy, prompts: Sequence[Ids], role: Role, shares: bool) -> float:
    """The `kl/sampler_mismatch` of completions that the trainer's model samples.

    Prompts have different lengths, two of each, and each is read once for two completions. They are
    sampled once without an end, and once with ends at which rows leave the batch one by one.
    """
    shortened = [prompt[: max(4, len(prompt) - i)] for i, prompt in enumerate(prompts[:PROMPTS])]
    others = [
        prompt[: len(prompt) // 2] + prompt[: len(prompt) // 2 - 1 : -1] for prompt in shortened
    ]
    requests = [Request(prompt, seed) for prompt in (*shortened, *others) for seed in range(2)]

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
        for request, completion in zip([*requests, *requests], [*endless, *ended], strict=True):
            logp_NV = own_logprobs(policy, request.prompt_ids, completion.token_ids)
            ids_N = torch.tensor(completion.token_ids, device=policy.device)
            logp.append(logp_NV.gather(1, ids_N[:, None])[:, 0].cpu())
            sampler.append(torch.tensor(completion.logprobs))
    log_ratio_N = (torch.cat(logp) - torch.cat(sampler)).double()
    return float((log_ratio_N.exp() - 1 - log_ratio_N).mean())
