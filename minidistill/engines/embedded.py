"""Sampling in this process with the trainer's own weights: transformers, nothing to sync.

On a GPU the host reads what was sampled once every `STEPS_PER_CHECK` tokens.

Shapes: `_B` sequences, `_V` vocabulary, `_L` length, `_N` completion tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from minidistill.engines.base import Engine, EngineCapabilities, Finished, Ids, not_finite_error
from minidistill.engines.progress import Progress
from minidistill.engines.sampler import Sampler
from minidistill.placement.attention import VARLEN, Layout
from minidistill.placement.limits import EMBEDDED_CACHE_BYTES, kv_bytes_per_token
from minidistill.trainer.batching import collate
from minidistill.trainer.decoding import Decoding, decodes_in_place
from minidistill.trainer.forward import (
    KeysValues,
    PrefixCache,
    hidden_states,
    seeded_cache,
    select_rows,
)
from minidistill.trainer.packed import can_pack, packed_weights
from minidistill.trainer.policy import Policy
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Advance, Completion, Request, Role, SamplingParams
from minidistill_kernels import linear_logprob

SCORING_TOKENS = 16384  # tokens of one scoring pass, padding included
STEPS_PER_CHECK = 16  # on a GPU; finished rows leave the batch at a check
# Of a GPU's free memory: a growing cache is copied, and prefilling needs room too
CACHE_SHARE = 0.5

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Requests whose prompts have been read."""

    cache: Any
    decoding: Decoding | None
    """The cache's rows, if they are written in place."""
    hidden_BH: Tensor
    """The last hidden state of each prompt."""
    mask_BL: Tensor
    """False at padding, which is on the left. True for the tokens to come."""
    lengths: list[int]
    """Of the prompts."""
    width: int
    """Tokens in the cache, padding included."""


class EmbeddedEngine(Engine):
    """The trainer's own model as an engine.

    A prompt that several requests share is prefilled once. The prefix that all prompts share is
    prefilled once a call, or once a run for a frozen teacher (its context).
    """

    name = "embedded"
    capabilities = EngineCapabilities(scores_at_any_temperature=True)

    def __init__(self, policy: Policy, prefixes: PrefixCache) -> None:
        self.policy, self.prefixes = policy, prefixes
        self.steps_per_check = STEPS_PER_CHECK if policy.device.type == "cuda" else 1
        """Rows leave at other steps with another value, which changes log-probs by rounding."""
        self.decoding = TokenBudget()
        self.scoring = TokenBudget(SCORING_TOKENS)
        self._peak_memory: int | None = None
        self.watch: Callable[[list[int]], None] | None = None
        """Called with each token of the rows that are being sampled, as soon as it is drawn. What
        it raises ends the sampling."""

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
            raise ValueError("the embedded engine does not return the most likely ids")
        on_gpu = self.policy.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.policy.device)
        with self.policy.unsharded(role), self.policy.running_as(role), self.policy.inference():
            progress = Progress(advance or (lambda count: None))
            done: dict[int, Completion] = {}
            for rows in self._rows_together(requests):
                done |= self._sample(requests, rows, params, role, progress)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.policy.device)
            self._peak_memory = max(peak, self._peak_memory or 0)
        return [done[i] for i in range(len(requests))]

    def _rows_together(self, requests: Sequence[Request]) -> list[list[int]]:
        """The rows that may be in one batch, with equal prompts side by side."""
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_ids)
        if self.policy.pads_prompts:
            return [order]
        lengths = [len(requests[i].prompt_ids) for i in order]
        return [
            [i for i, length in zip(order, lengths, strict=True) if length == each]
            for each in sorted(set(lengths))
        ]

    def _sample(
        self,
        requests: Sequence[Request],
        order: list[int],
        params: SamplingParams,
        role: Role,
        progress: Progress,
    ) -> dict[int, Completion]:
        """The completions of these rows, in batches that fit in memory."""

        def decode(batch: list[int]) -> list[Completion]:
            # back in the order of the rows, so that requests of one prompt stay side by side
            rows = sorted(order[i] for i in batch)
            with progress.attempt():
                completions = self._decode(requests, rows, params, role, progress)
            done = dict(zip(rows, completions, strict=True))
            return [done[order[i]] for i in batch]

        kv_bytes = kv_bytes_per_token(self.policy.config, self.policy.dtype.itemsize)
        completions = self.decoding.run(
            [len(requests[i].prompt_ids) + params.max_tokens for i in order],
            decode,
            "sampling with the trainer's model",
            at_most=max(1, cache_bytes(self.policy.device) // kv_bytes),
        )
        return dict(zip(order, completions, strict=True))

    def _decode(
        self,
        all_requests: Sequence[Request],
        chosen: Sequence[int],
        params: SamplingParams,
        role: Role,
        advance: Advance,
    ) -> list[Completion]:
        """Decode the `chosen` requests in one batch. Finished rows leave it at the next check."""
        requests = [all_requests[i] for i in chosen]
        prefix = self.prefixes.common([r.prompt_ids for r in requests], role)
        # with the weights as they are, so that what is kept does not depend on who computed it
        states = self.prefixes.states(prefix, role)
        with self._weights(len(requests), params.max_tokens) as logits:
            prompts = self._prefill(requests, prefix, states, params.max_tokens)
            return self._decode_after(prompts, requests, chosen, params, logits, advance)

    def _weights(
        self, rows: int, max_tokens: int
    ) -> contextlib.AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Run packed copies of the weights if that pays off. Yields what gives logits."""
        if can_pack(self.policy, max_tokens - 1):
            return packed_weights(self.policy, rows)
        return contextlib.nullcontext(self.policy.logits)

    def _decode_after(
        self,
        prompts: Prefilled,
        requests: Sequence[Request],
        chosen: Sequence[int],
        params: SamplingParams,
        logits: Callable[[Tensor], Tensor],
        advance: Advance,
    ) -> list[Completion]:
        policy, max_tokens = self.policy, params.max_tokens
        device, total = policy.device, len(requests)
        cache, decoding = prompts.cache, prompts.decoding
        hidden_BH, mask_BL = prompts.hidden_BH, prompts.mask_BL
        lengths, masks_queries = prompts.lengths, self._masks_queries(prompts.cache)
        sample = Sampler(params.temperature)
        draws = [np.random.default_rng(r.seed).random(max_tokens) for r in requests]
        draws_BL = torch.from_numpy(np.stack(draws)).to(device)
        eos_ids = torch.tensor(sorted(policy.eos_ids), dtype=torch.int64, device=device)
        ids_BL = torch.zeros(total, max_tokens, dtype=torch.int64, device=device)
        logprobs_BL = torch.zeros(total, max_tokens, device=device)
        rows_B, positions_B = torch.arange(total, device=device), torch.tensor(lengths).to(device)
        ended_B = torch.zeros(total, dtype=torch.bool, device=device)
        for step in range(max_tokens):
            chosen_B, logp_B = sample(logits(hidden_BH), draws_BL[:, step])
            ids_BL[rows_B, step], logprobs_BL[rows_B, step] = chosen_B, logp_B
            if self.watch is not None:
                self.watch(chosen_B.tolist())
            ended_B = ended_B | (chosen_B[:, None] == eos_ids).any(dim=1)
            last = step + 1 == max_tokens
            if last or (step + 1) % self.steps_per_check == 0:
                since = step + 1 - self.steps_per_check
                finite = torch.isfinite(logprobs_BL[:, max(0, since) : step + 1]).all()
                *ended, all_finite = torch.cat([ended_B, finite[None]]).tolist()
                if not all_finite:
                    broken_B = ~logprobs_BL.isfinite().all(dim=1)
                    raise not_finite_error(self, chosen[int(broken_B.nonzero()[0])])
                unfinished = [i for i, end in enumerate(ended) if not end]
                advance(len(ended) - (0 if last else len(unfinished)))
                if not unfinished or last:
                    break
                if len(unfinished) < len(ended):
                    order = decoding.keep(unfinished) if decoding else unfinished
                    keep = torch.tensor(order).to(device)
                    lengths = [lengths[i] for i in order]
                    if decoding is None:
                        select_rows(cache, keep)
                    mask_BL, draws_BL, chosen_B = mask_BL[keep], draws_BL[keep], chosen_B[keep]
                    rows_B, positions_B, ended_B = rows_B[keep], positions_B[keep], ended_B[keep]
            mask = None
            if decoding is None and min(lengths) < prompts.width:
                mask = mask_BL[:, : prompts.width + step + 1]
                # of two dimensions, transformers would ask the device whether there is padding
                mask = mask[:, None, None] if masks_queries else mask
            positions = (positions_B + step)[:, None]
            more = {"decoding": decoding} if decoding else {}
            hidden_BH = self._forward(chosen_B[:, None], mask, positions, cache, **more)
        return self._completions(ids_BL.cpu().numpy(), logprobs_BL.cpu().numpy())

    def _completions(self, ids_BL: Array, logprobs_BL: Array) -> list[Completion]:
        """Each row up to its first end token."""
        ends_BL = np.isin(ids_BL, sorted(self.policy.eos_ids))
        ended = [bool(ends.any()) for ends in ends_BL]
        lengths: list[int] = np.where(ended, ends_BL.argmax(axis=1) + 1, ids_BL.shape[1]).tolist()
        rows = zip(ids_BL, logprobs_BL, lengths, ended, strict=True)
        return [
            Completion(tuple(ids[:n].tolist()), tuple(p[:n].tolist()), "eos" if end else "length")
            for ids, p, n, end in rows
        ]

    def _prefill(
        self,
        requests: Sequence[Request],
        prefix: tuple[int, ...],
        states: KeysValues | None,
        max_tokens: int,
    ) -> Prefilled:
        """Read the prompts after the prefix that all begin with; equal ones once."""
        device = self.policy.device
        by_prompt = groupby(request.prompt_ids for request in requests)
        distinct = [(prompt, len(list(copies))) for prompt, copies in by_prompt]
        prompts = [prompt for prompt, _ in distinct]
        lengths = np.array([len(prompt) - len(prefix) for prompt in prompts])
        width = int(lengths.max())
        # padded on the left: all end in the same column
        real_BL = np.arange(width) >= width - lengths[:, None]
        ids_BL = np.full(real_BL.shape, self.policy.pad_id, dtype=np.int64)
        new = chain.from_iterable(prompt[len(prefix) :] for prompt in prompts)
        ids_BL[real_BL] = np.fromiter(new, dtype=np.int64, count=int(lengths.sum()))
        real = np.pad(real_BL, ((0, 0), (len(prefix), max_tokens)), constant_values=True)
        mask_BL = torch.from_numpy(real).to(device)
        cache = seeded_cache(self.policy, states, len(prompts))
        in_place = decodes_in_place(self.policy, cache)
        seen_BL = mask_BL[:, : len(prefix) + width]
        positions_BL = (seen_BL.cumsum(1) - 1).clamp(min=0)[:, len(prefix) :]
        ids = torch.from_numpy(ids_BL).to(device)
        padded = int(lengths.min()) < width
        # without padding and a prefix, transformers' own causal attention needs no mask
        mask = seen_BL if padded or prefix or not in_place else None
        hidden_BH = self._forward(ids, mask, positions_BL, cache)
        copies = [count for _, count in distinct]
        index = torch.from_numpy(np.arange(len(prompts)).repeat(copies)).to(device)
        decoding = None
        if in_place:
            decoding = Decoding(cache, copies, seen_BL if padded else None, states, max_tokens)
        else:
            select_rows(cache, index)
        return Prefilled(
            cache=cache,
            decoding=decoding,
            hidden_BH=hidden_BH[index],
            mask_BL=mask_BL[index],
            lengths=(lengths + len(prefix)).repeat(copies).tolist(),
            width=len(prefix) + width,
        )

    def _forward(
        self, ids_BL: Tensor, mask: Tensor | None, positions_BL: Tensor, cache: Any, **more: Any
    ) -> Tensor:
        """The last column's hidden states, (B, H)."""
        return self.policy.body(
            input_ids=ids_BL,
            attention_mask=mask,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
            **more,
        ).last_hidden_state[:, -1]

    def _masks_queries(self, cache: Any) -> bool:
        """Whether every layer takes a boolean mask of queries and keys."""
        return self.policy.config._attn_implementation in ("sdpa", VARLEN) and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        prefix, layout = self.prefixes.common(prompts, role), self.policy.attention.prefix_layout
        with self.policy.unsharded(role), self.policy.running_as(role), self.policy.inference():
            states = self.prefixes.states(prefix, role)

            def score(rows: list[int]) -> list[list[float]]:
                tokens = collate(
                    [prompts[i] for i in rows],
                    [completions[i] for i in rows],
                    pad_id=self.policy.pad_id,
                    layout=layout,
                    prefix=prefix,
                ).to(self.policy.device)
                hidden_NH = hidden_states(self.policy, tokens, states)
                logp_N, _ = linear_logprob(
                    hidden_NH, self.policy.head, tokens.targets_N, temperature=temperature
                )
                parts = logp_N.cpu().split([len(completions[i]) for i in rows])
                return [part.tolist() for part in parts]

            doing = "scoring with the trainer's model"
            return self.scoring.run(lengths, score, doing, packed=layout is Layout.SHARED)

    def sync(self, version: int) -> None:
        """Does nothing: the engine runs the trainer's own tensors."""

    def peak_memory(self) -> int | None:
        """On a GPU the peak while sampling. None on a CPU: the trainer reports this process."""
        return self._peak_memory


def cache_bytes(device: torch.device) -> int:
    """Bytes that the keys and values of the sequences decoded at a time may take."""
    if device.type != "cuda":
        return EMBEDDED_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(CACHE_SHARE * (free + unused))
