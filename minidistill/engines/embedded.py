"""Sampling in this process with the trainer's own weights: transformers, nothing to sync.

Shapes: `_B` sequences, `_V` vocabulary, `_L` length, `_N` completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidistill.engines.base import Engine, EngineCapabilities, Finished, Ids, not_finite_error
from minidistill.placement.limits import EMBEDDED_CACHE_BYTES, kv_bytes_per_token
from minidistill.trainer.batching import collate, split_by_tokens
from minidistill.trainer.forward import PrefixCache, hidden_states, seeded_cache
from minidistill.trainer.policy import Policy
from minidistill.types import Advance, Completion, Request, Role, SamplingParams
from minidistill_kernels import linear_logprob

SCORING_TOKENS = 16384  # padded tokens of one scoring pass


class EmbeddedEngine(Engine):
    """The trainer's own model as an engine.

    A prompt that several requests share is prefilled once. The prefix that all prompts share is
    prefilled once a call, or once a run for a frozen teacher (its context).
    """

    name = "embedded"
    capabilities = EngineCapabilities(scores_at_any_temperature=True)

    def __init__(self, policy: Policy, prefixes: PrefixCache) -> None:
        self.policy, self.prefixes = policy, prefixes
        self._peak_memory: int | None = None

    @property
    def location(self) -> str:
        return str(self.policy.device)

    @property
    def description(self) -> str:
        return f"{super().description}, sharing the trainer's weights"

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        if params.top_ids:
            raise ValueError("the embedded engine returns no likeliest ids")
        done: dict[int, Completion] = {}
        on_gpu = self.policy.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.policy.device)
        with self.policy.unsharded(role), self.policy.running_as(role), self.policy.inference():
            # equal prompts side by side, to be prefilled once
            order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_ids)
            for rows in self._batches(requests, order, params.max_tokens):
                completions = self._decode([requests[i] for i in rows], params, role, advance)
                done.update(zip(rows, completions, strict=True))
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.policy.device)
            self._peak_memory = max(peak, self._peak_memory or 0)
        return [done[i] for i in range(len(requests))]

    def _batches(
        self, requests: Sequence[Request], order: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        kv_bytes = kv_bytes_per_token(self.policy.config, self.policy.dtype.itemsize)
        lengths = [len(requests[i].prompt_ids) + max_tokens for i in order]
        groups = split_by_tokens(lengths, max(1, EMBEDDED_CACHE_BYTES // kv_bytes))
        # back in the order of the rows, so that requests of one prompt stay side by side
        return [sorted(order[i] for i in group) for group in groups]

    def _decode(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None,
    ) -> list[Completion]:
        """Decode one batch. Finished rows are removed from it."""
        max_tokens, temperature = params.max_tokens, params.temperature
        device = self.policy.device
        cache, mask_BL, hidden_BH = self._prefill(requests, role)
        draws_BL = torch.tensor(
            np.stack([np.random.default_rng(r.seed).random(max_tokens) for r in requests]),
            device=device,
        )
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        ended = [False] * len(requests)
        rows = list(range(len(requests)))
        for step in range(max_tokens):
            chosen_B, logp_B = sample(self.policy.logits(hidden_BH), temperature, draws_BL[:, step])
            for row, token, logp in zip(rows, chosen_B.tolist(), logp_B.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row].append(logp)
                ended[row] = token in self.policy.eos_ids
            unfinished = [i for i, row in enumerate(rows) if not ended[row]]
            last = step + 1 == max_tokens
            if advance is not None:
                advance(len(rows) - (0 if last else len(unfinished)))
            if not unfinished or last:
                break
            if len(unfinished) < len(rows):
                keep = torch.tensor(unfinished, device=device)
                rows = [rows[i] for i in unfinished]
                cache.batch_select_indices(keep)
                mask_BL, draws_BL, chosen_B = mask_BL[keep], draws_BL[keep], chosen_B[keep]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], dim=1)
            hidden_BH = self._forward(chosen_B[:, None], mask_BL, cache)
        return [
            Completion(tuple(t), tuple(p), "eos" if end else "length")
            for t, p, end in zip(tokens, logprobs, ended, strict=True)
        ]

    def _prefill(self, requests: Sequence[Request], role: Role) -> tuple[Any, Tensor, Tensor]:
        """Cache, mask and last hidden state of every request; equal prompts are prefilled once."""
        device = self.policy.device
        by_prompt = groupby(request.prompt_ids for request in requests)
        distinct = [(prompt, len(list(copies))) for prompt, copies in by_prompt]
        prompts = [prompt for prompt, _ in distinct]
        prefix = self.prefixes.common(prompts)
        width = max(map(len, prompts)) - len(prefix)
        ids_BL = torch.full((len(prompts), width), self.policy.pad_id)
        mask_BL = torch.zeros(len(prompts), len(prefix) + width, dtype=torch.int64)
        mask_BL[:, : len(prefix)] = 1
        for row, prompt in enumerate(prompts):  # padded on the left: all end in the same column
            length = len(prompt) - len(prefix)
            ids_BL[row, width - length :] = torch.tensor(prompt[len(prefix) :])
            mask_BL[row, len(prefix) + width - length :] = 1
        mask_BL = mask_BL.to(device)
        cache = seeded_cache(self.policy, self.prefixes.states(prefix, role), len(prompts))
        hidden_BH = self._forward(ids_BL.to(device), mask_BL, cache)
        index = torch.arange(len(prompts)).repeat_interleave(torch.tensor([n for _, n in distinct]))
        index = index.to(device)
        cache.batch_select_indices(index)
        return cache, mask_BL[index], hidden_BH[index]

    def _forward(self, ids_BL: Tensor, mask_BL: Tensor, cache: Any) -> Tensor:
        """The last column's hidden states, (B, H)."""
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
        return self.policy.body(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        scores: dict[int, list[float]] = {}
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        prefix = self.prefixes.common(prompts)
        with self.policy.unsharded(role), self.policy.running_as(role), self.policy.inference():
            states = self.prefixes.states(prefix, role)
            for rows in split_by_tokens(lengths, SCORING_TOKENS):
                tokens = collate(
                    [prompts[i] for i in rows],
                    [completions[i] for i in rows],
                    pad_id=self.policy.pad_id,
                    prefix=prefix,
                ).to(self.policy.device)
                hidden_NH = hidden_states(self.policy, tokens, states)
                logp_N, _ = linear_logprob(
                    hidden_NH, self.policy.head_VH, tokens.targets_N, temperature=temperature
                )
                parts = logp_N.cpu().split([len(completions[i]) for i in rows])
                scores.update((i, part.tolist()) for i, part in zip(rows, parts, strict=True))
        return [scores[i] for i in range(len(prompts))]

    def sync(self, version: int) -> None:
        """Does nothing: the engine runs the trainer's own tensors."""

    def peak_memory(self) -> int | None:
        """On a GPU the peak while sampling. None on a CPU: the trainer reports this process."""
        return self._peak_memory


def sample(logits_BV: Tensor, temperature: float, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids by inverse transform of uniform draws in [0, 1), and their log-probs, fp32.

    Raises UserError (exit code 4) for logits that are not finite.
    """
    logits_BV = logits_BV.float()
    if not torch.isfinite(logits_BV.amax(dim=-1)).all():
        raise not_finite_error()
    if temperature == 0:
        logp_BV = torch.log_softmax(logits_BV, dim=-1)
        chosen_B = logits_BV.argmax(dim=-1)
    else:
        logp_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
        mass_BV = logp_BV.exp().double().cumsum(dim=-1)
        # `right` skips tokens of zero mass; clamping keeps a rounded-up point inside the range
        total_B1 = mass_BV[:, -1:]
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        points_B1 = torch.minimum(draws_B[:, None] * total_B1, below_B1).contiguous()
        chosen_B = torch.searchsorted(mass_BV, points_B1, right=True)[:, 0]
    return chosen_B, logp_BV.gather(1, chosen_B[:, None])[:, 0]
