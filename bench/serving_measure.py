"""The ways to serve what a context causes, what their requests hold, and their rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from bench.engines import Draws, Tokens
from bench.serving_client import Round, ask
from bench.serving_servers import ADAPTER, BASE
from minidistill.errors import EXIT_FAILED, UserError

PLAIN, CACHING, LORA = "no prefix cache", "prefix cache", "adapter"
"""The servers."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve the behaviour that the context causes."""

    name: str
    server: str
    model: str = BASE
    context: bool = False
    shares: bool = False
    """Whether requests share the context's keys and values."""


WAYS = (
    Way("context, no prefix cache", PLAIN, context=True),
    Way("context, prefix cache", CACHING, context=True, shares=True),
    Way("adapter", LORA, ADAPTER),
    # the same shapes as the base, so that it need not be made
    Way("adapter merged", CACHING),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    contexts: tuple[int, ...]
    at_once: int
    question: int
    completion: int
    rounds: int
    limit: float

    @property
    def longest(self) -> int:
        return max(self.contexts) + self.question + self.completion

    def cache_tokens(self, server: str) -> int:
        """Tokens that fit into a server's cache."""
        most, own = self.at_once, self.question + self.completion
        if server == PLAIN:
            return most * self.longest
        # contexts stay cached, beside what requests that have ended leave there
        contexts = sum(self.contexts) if server == CACHING else 0
        return self.longest + contexts + 2 * most * own


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values of requests with the same context, by formula."""

    prompt: int
    """Tokens."""
    completion: int
    shared: int
    """Blocks that all requests have in common."""
    block: int
    """Tokens of a block."""
    token_bytes: int

    @classmethod
    def of(cls, way: Way, context: int, setting: Setting, block: int, token_bytes: int) -> Memory:
        prompt = setting.question + (context if way.context else 0)
        shared = context // block if way.shares and way.context else 0  # full blocks only
        return cls(prompt, setting.completion, shared, block, token_bytes)

    def blocks(self, requests: int, sampled: int) -> int:
        """Blocks of some requests at once after so many sampled tokens."""
        alone = math.ceil((self.prompt + sampled) / self.block)
        return self.shared + requests * (alone - self.shared)

    def bytes(self, requests: int) -> int:
        """The most bytes of some requests at once."""
        return self.blocks(requests, self.completion) * self.block * self.token_bytes

    @property
    def more(self) -> int:
        """Bytes that one more request adds."""
        return self.bytes(2) - self.bytes(1)


def check_round(way: Way, result: Round, memory: Memory, cached: int) -> None:
    """Raise UserError unless each request read `cached` tokens from the prefix cache, and all held
    as many blocks as the formula says."""
    read = sorted({answer.cached for answer in result.answers})
    if read != [cached]:
        _refuse(way, f"{read} tokens of a prompt came from the prefix cache, not {cached}")
    if result.blocks is not None:
        count = len(result.answers)
        # how far the completions were is not known
        least, most = (memory.blocks(count, sampled) for sampled in (0, memory.completion))
        if not least <= result.blocks <= most:
            _refuse(way, f"{count} requests held {result.blocks} blocks, not {least} to {most}")


def _refuse(way: Way, what: str) -> NoReturn:
    raise UserError(f"{way.name}: {what}", exit_code=EXIT_FAILED)


class Measurement:
    """Measures all ways, with servers that run."""

    def __init__(
        self, setting: Setting, urls: Mapping[str, str], draws: Draws, block: int, token_bytes: int
    ) -> None:
        self.setting, self.urls, self.draws = setting, urls, draws
        self.block, self.token_bytes = block, token_bytes

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the table, way by way for each context and number of requests at once."""
        for length in self.setting.contexts:
            (context,) = self.draws.rows(1, length)
            memory = {
                way: Memory.of(way, length, self.setting, self.block, self.token_bytes)
                for way in WAYS
            }
            # the first request reads the context, and warms up
            first = {way: self.ask(way, context, 1, look=True) for way in WAYS}
            for way in WAYS:
                check_round(way, first[way], memory[way], cached=0)
            one = self.rounds(WAYS, context, 1, memory)
            for way in WAYS:
                row = {"context": length, "at_once": 1, "way": way.name}
                row |= {"cold": first[way].answers[0].first}
                yield row | held(memory[way], 1, first[way].blocks) | figures(one[way])
            yield from self.rows_at_once(length, context, memory, one)

    def rows_at_once(
        self,
        length: int,
        context: Tokens,
        memory: Mapping[Way, Memory],
        one: Mapping[Way, Sequence[Round]],
    ) -> Iterator[dict[str, Any]]:
        """The rows with several requests at once. Ways that would take too long are left out."""
        count = self.setting.at_once
        if count == 1:
            return
        # at worst they are served one after another
        seconds = {way: count * statistics.median(r.seconds for r in one[way]) for way in WAYS}
        ways = [way for way in WAYS if seconds[way] <= self.setting.limit]
        warm_up = {way: self.ask(way, context, count, look=True) for way in ways}
        for way in ways:
            check_round(way, warm_up[way], memory[way], memory[way].shared * self.block)
        results = self.rounds(ways, context, count, memory)
        for way in WAYS:
            row = {"context": length, "at_once": count, "way": way.name}
            if way in ways:
                row |= held(memory[way], count, warm_up[way].blocks) | figures(results[way])
            else:
                row |= held(memory[way], count) | {"seconds": seconds[way]}
            yield row

    def rounds(
        self, ways: Sequence[Way], context: Tokens, count: int, memory: Mapping[Way, Memory]
    ) -> dict[Way, list[Round]]:
        """Rounds of the ways in turns, until there are enough or the time is used up."""
        results: dict[Way, list[Round]] = {way: [] for way in ways}
        began = time.perf_counter()
        for index in range(self.setting.rounds):
            if index and time.perf_counter() - began > self.setting.limit:
                break
            for way in ways[:: -1 if index % 2 else 1]:
                result = self.ask(way, context, count)
                check_round(way, result, memory[way], memory[way].shared * self.block)
                results[way].append(result)
        return results

    def ask(self, way: Way, context: Tokens, count: int, *, look: bool = False) -> Round:
        questions = self.draws.rows(count, self.setting.question)
        prompts = [(*context, *q) if way.context else q for q in questions]
        return ask(self.urls[way.server], way.model, prompts, self.setting.completion, look=look)


def held(memory: Memory, count: int, counted: int | None = None) -> dict[str, Any]:
    """What so many requests hold: bytes and blocks by formula, and the blocks that vLLM counted."""
    return {
        "bytes": memory.bytes(1),
        "more_bytes": memory.more,
        "blocks": memory.blocks(count, memory.completion),
        "blocks_counted": counted,
    }


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians: over all requests of the times, over the rounds of the rate."""
    answers = [answer for round in rounds for answer in round.answers]
    return {
        "first": statistics.median(answer.first for answer in answers),
        "between": statistics.median(answer.between for answer in answers),
        "rate": statistics.median(round.rate for round in rounds),
        "rounds": [
            {
                "seconds": round.seconds,
                "first": [answer.first for answer in round.answers],
                "between": [answer.between for answer in round.answers],
            }
            for round in rounds
        ],
    }
