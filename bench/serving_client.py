"""What a client of a vLLM server sees: the time of each streamed token, and the server's blocks."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from minidistill.errors import EXIT_ENVIRONMENT, UserError

SECONDS = 1800.0  # without a byte, before a server is given up


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed completion. Times are in seconds since its request was sent."""

    times: tuple[float, ...]
    """When each token arrived."""
    cached: int
    """Tokens of the prompt whose keys and values were in the prefix cache."""

    @property
    def first(self) -> float:
        """The time to first token."""
        return self.times[0]

    @property
    def between(self) -> float:
        """The mean time from one token to the next."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that were sent at once."""

    seconds: float
    """From the first request to the last token."""
    answers: tuple[Answer, ...]
    blocks: int | None
    """Blocks in use while all completions were being sampled; None if that was not looked at, or
    if the first completion was half done before the last began."""

    @property
    def rate(self) -> float:
        """Sampled tokens per second."""
        return sum(len(answer.times) for answer in self.answers) / self.seconds


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of keys and values of a server."""

    tokens: int
    """Of one block."""
    total: int
    used: int
    """By requests that run. What only the prefix cache holds is free to them."""


def read_blocks(metrics: str) -> Blocks:
    """The blocks, from the text of a server's /metrics. Raises UserError if it does not say."""
    usage = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)", metrics, re.MULTILINE)
    config = re.search(r"^vllm:cache_config_info\{(.*)\} ", metrics, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', config[1])) if config else {}
    try:
        tokens, total = int(labels["block_size"]), int(labels["num_gpu_blocks"])
        # vLLM keeps one block for itself
        used = round(float(usage[1]) * (total - 1)) if usage else None
    except (KeyError, ValueError):
        used = None
    if used is None:
        raise UserError(
            "vLLM's /metrics does not say how many blocks of keys and values there are",
            fix="install vllm 0.32 or 0.33",
            exit_code=EXIT_ENVIRONMENT,
        )
    return Blocks(tokens, total, used)


def blocks_of(url: str) -> Blocks:
    return read_blocks(httpx.get(f"{url}/metrics", trust_env=False, timeout=SECONDS).text)


def ask(
    url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int, *, look: bool = False
) -> Round:
    """Send all prompts at once and stream `tokens` tokens of each; the end of text ends none.

    With `look`, asks for the blocks in use as soon as all completions have begun. That takes the
    server some time. Raises UserError for what is not an answer of that many tokens.
    """
    return asyncio.run(_ask(url, model, prompts, tokens, look))


async def _ask(
    url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int, look: bool
) -> Round:
    # no limit on connections: they would queue here, not at the server
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS, limits=limits) as client:
        streams = [_Stream(prompt) for prompt in prompts]
        watch = asyncio.create_task(_watch(client, url, streams, tokens)) if look else None
        began = time.perf_counter()
        try:
            answers = await asyncio.gather(
                *(stream.read(client, url, model, tokens) for stream in streams)
            )
            seconds = time.perf_counter() - began
            return Round(seconds, tuple(answers), await watch if watch else None)
        except httpx.HTTPError as error:
            raise UserError(
                f"vLLM's server broke off: {type(error).__name__}: {error}",
                where=url,
                fix="the last line of its output may say why",
                exit_code=EXIT_ENVIRONMENT,
            ) from error
        finally:
            if watch:
                watch.cancel()


class _Stream:
    """A completion that is being streamed."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = list(prompt)
        self.times: list[float] = []
        self.begun = asyncio.Event()

    async def read(self, client: httpx.AsyncClient, url: str, model: str, tokens: int) -> Answer:
        body = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            # each chunk says how many tokens there are so far, the last how many were cached
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        usage: dict[str, Any] = {}
        began = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise _wrong(url, f"HTTP {answer.status_code}: {text[:300]}")
            async for line in answer.aiter_lines():
                now = time.perf_counter() - began
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                usage = json.loads(data).get("usage") or {}
                self.times += [now] * (usage.get("completion_tokens", 0) - len(self.times))
                if self.times:
                    self.begun.set()
        if len(self.times) != tokens or usage.get("prompt_tokens") != len(self.prompt):
            raise _wrong(url, f"{len(self.times)} of {tokens} tokens, {usage}")
        details = usage.get("prompt_tokens_details") or {}
        return Answer(tuple(self.times), details.get("cached_tokens") or 0)


async def _watch(
    client: httpx.AsyncClient, url: str, streams: Sequence[_Stream], tokens: int
) -> int | None:
    """The blocks in use once all have begun, if none was near its end by then."""
    for stream in streams:
        await stream.begun.wait()
    metrics = (await client.get(f"{url}/metrics")).text
    late = any(2 * len(stream.times) > tokens for stream in streams)
    return None if late else read_blocks(metrics).used


def _wrong(url: str, what: str) -> UserError:
    return UserError(
        f"vLLM's server answered what was not asked for: {what}",
        where=url,
        fix="if the flags that were passed on to it do not explain that, install vllm 0.32 or 0.33",
        exit_code=EXIT_ENVIRONMENT,
    )
