"""Sampling and scoring on an external vLLM server, on this machine or another.

Completions use the OpenAI API, token ids in and token ids out. Adapters go through a folder that
the server can read. Each version has its own name, so requests in flight finish with the version
that they named, and the version that sampled a completion is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.engines.base import Engine, Finished, Ids
from minidistill.engines.server.adapters import Adapter, Adapters, remove_leftovers
from minidistill.engines.server.answers import (
    AbortedError,
    read_model,
    read_sample,
    read_scores,
)
from minidistill.engines.server.connection import BusyError, Server
from minidistill.engines.server.http import KEY, Client, GoneError, Post
from minidistill.engines.server.probe import check_same_model, server_command
from minidistill.engines.vllm.engine import NAMES, SEED_BITS
from minidistill.errors import UserError
from minidistill.placement.placement import EnginePlacement
from minidistill.system.http import Answer, read_key
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

Take = Callable[[int, Answer, str, int | None], None]
"""Takes a request's index, the answer, the name of the model or adapter that was asked, and the
version of the adapter."""
CLOSE_SECONDS = 10.0  # for each adapter that is removed at the end
BYTES_PER_TOKEN = 1 << 10  # of an answer, at most: a few numbers and names


class ServerEngine(Engine):
    """One running vLLM server. Two threads may call: one that samples, one that syncs.

    If the server goes away, the engine waits for it. It then sends the current adapters and repeats
    the unanswered requests.
    """

    name = "vLLM server"
    streams = True

    def __init__(
        self,
        url: str,
        where: str,
        command: str,
        min_length: int,
        folder: Path,
        max_restarts: int,
        silence: float,
    ) -> None:
        """`where` is the setting that has the `url`, and `command` starts a suitable server.

        The server must allow sequences of `min_length` tokens. Adapters are written to `folder`.
        `silence` is how many seconds it may answer none of the completions that it was asked for.
        Raises UserError for an API key that cannot be sent.
        """
        largest = (1 << 20) + BYTES_PER_TOKEN * min_length
        url = url.rstrip("/").removesuffix("/v1")
        client = Client(url, read_key(KEY, where), silence, largest)
        self.server = Server(client, self.name, where, command, max_restarts)
        self.min_length = min_length
        self._model = ""
        self._policy: Policy | None = None
        self._adapter_weights: tuple[Weights, ...] = ()
        self._adapters = Adapters(folder)

    @property
    def location(self) -> str:
        return self.server.client.url

    @property
    def description(self) -> str:
        return self.server.description

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        self._policy = policy
        served = dict.fromkeys(map(policy.weights_of, roles)) if policy.lora else ()
        self._adapter_weights = tuple(weights for weights in served if weights in NAMES)

    def wait_until_ready(self) -> None:
        try:
            self.server.repeating(self._check_server)
            if self._adapter_weights:
                self.server.repeating(self._check_takes_adapters)
        except GoneError as error:
            fix = f"correct the URL, or start it:\n{self.server.command}"
            raise self.server.refusal(f"cannot be reached: {error}", fix) from error

    def verify(self, trainer: Engine, temperature: float | None) -> None:
        assert self._policy is not None
        check_same_model(
            self, self._policy, trainer, temperature, self.server.where, self.server.command
        )

    # -- the engine ----------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        if params.top_ids:
            raise ValueError("a server cannot score the most likely ids, so it returns none")
        assert self._policy is not None
        common = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            # overriding the defaults of the server and of the model's files
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": sorted(self._policy.eos_ids),
            "ignore_eos": True,  # stop at these alone, not at what the server takes for the end
        }
        bodies = [common | {"prompt": r.prompt_ids, "seed": r.seed & SEED_BITS} for r in requests]
        completions: dict[int, Completion] = {}
        vocabulary, eos_ids = len(self._policy.head_VH), self._policy.eos_ids

        def take(index: int, answer: Answer, model: str, version: int | None) -> None:
            ids, logprobs, stop = read_sample(answer, model, params.max_tokens, vocabulary, eos_ids)
            versions = () if version is None else ((0, version),)
            completions[index] = Completion(ids, logprobs, stop, versions=versions)
            if advance is not None:
                advance(1)
            if finished is not None:
                finished(0, [(index, completions[index], None)])

        self._complete(bodies, role, take)
        return [completions[i] for i in range(len(requests))]

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        if temperature != 1:
            raise ValueError("vLLM scores given tokens at temperature 1 only")
        # a server skips its prefix cache for these requests, so every row is valid
        common = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        bodies = [common | {"prompt": [*p, *c]} for p, c in zip(prompts, completions, strict=True)]
        scores: dict[int, list[float]] = {}

        def take(index: int, answer: Answer, model: str, version: int | None) -> None:
            scores[index] = read_scores(answer, model, prompts[index], completions[index])

        self._complete(bodies, role, take)
        return [scores[i] for i in range(len(prompts))]

    def sync(self, version: int) -> None:
        """Send the adapters through the folder."""
        assert self._policy is not None
        for weights in self._adapter_weights:
            with self.server.lock:
                if self.server.closed.is_set():  # closed by another thread: leave nothing behind
                    return
                adapter = self._adapters.write(self._policy, weights, version)
                self.server.retrying(partial(self._load, adapter), self._restore)
                self._adapters.switch(adapter)
        self._unload_idle()

    def close(self) -> None:
        """Cancel requests in flight. Remove this run's adapters from the server and the disk."""
        self.server.closed.set()
        with self.server.lock:
            with contextlib.suppress(GoneError, UserError):
                for adapter in self._adapters.all:
                    self._unload(adapter, CLOSE_SECONDS)
            self._adapters.delete()

    # -- adapters ------------------------------------------------------------------------------

    def _load(self, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
        answer = self.server.request("POST", "/v1/load_lora_adapter", body)
        # an earlier attempt may have arrived although its answer was lost
        if answer.status != HTTPStatus.OK and "already been loaded" not in answer.message():
            self._raise_if_busy(answer)
            raise self.server.refusal(
                f"did not load the adapter in {adapter.path}: {answer.message()}",
                "let it read that folder (the same machine, or a shared file system), and start it "
                f"with\n{self.server.command}",
            )

    def _raise_if_busy(self, answer: Answer) -> None:
        """As of the server, but a 500 is how vLLM refuses an adapter."""
        if answer.status != HTTPStatus.INTERNAL_SERVER_ERROR:
            self.server.raise_if_busy(answer)

    def _unload(self, adapter: Adapter, *seconds: float) -> None:
        body = {"lora_name": adapter.name}
        self.server.request("POST", "/v1/unload_lora_adapter", body, *seconds)

    def _unload_idle(self) -> None:
        for adapter in self._adapters.take_idle():
            with contextlib.suppress(GoneError):  # the server is gone, and its adapters with it
                self._unload(adapter)
            shutil.rmtree(adapter.path, ignore_errors=True)

    def _check_takes_adapters(self) -> None:
        """Check that it tries to load an adapter, with one that does not exist."""
        name = self._adapters.name("probe")
        body = {"lora_name": name, "lora_path": f"/nowhere/{name}"}
        answer = self.server.request("POST", "/v1/load_lora_adapter", body)
        if answer.status == HTTPStatus.NOT_FOUND and name in answer.message():
            return
        self._raise_if_busy(answer)
        why = f"does not load adapters at run time: {answer.message()}"
        raise self.server.refusal(why, f"start it with\n{self.server.command}")

    # -- the server ----------------------------------------------------------------------------

    def _check_server(self) -> None:
        """Read the name of its model, and check its sequence length."""
        answer = self.server.accepted(self.server.request("GET", "/v1/models"))
        with self.server.checked_answers():
            model = read_model(answer)
        if model is None:
            raise self.server.refusal("serves no model", f"start it with\n{self.server.command}")
        self._model, length = model
        if length is not None and length < self.min_length:
            why = f"allows {length} tokens, the run needs {self.min_length}"
            raise self.server.refusal(why, f"start it with\n{self.server.command}")

    def _complete(self, bodies: Sequence[dict[str, Any]], role: Role, take: Take) -> None:
        """Send the requests concurrently, and `take` each answer."""
        assert self._policy is not None
        weights = self._policy.weights_of(role)
        answered: set[int] = set()
        fixed = {"add_special_tokens": False, "skip_special_tokens": False}

        async def complete(post: Post, index: int) -> None:
            for tries in count(1):
                try:
                    await once(post, index)
                    return
                except BusyError as error:
                    pause = self.server.pause(error, tries)
                await asyncio.sleep(pause * (1 + index % 8 / 8))  # not all at the same time

        async def once(post: Post, index: int) -> None:
            with self._adapters.using(weights) as adapter:  # the latest when it is sent
                name = adapter.name if adapter else self._model
                with self.server.checked_answers():
                    answer = await post("/v1/completions", fixed | bodies[index] | {"model": name})
                    if adapter and answer.status == HTTPStatus.NOT_FOUND:
                        raise GoneError(f"it was restarted: {answer.message()}")
                    version = adapter.version if adapter else None
                    try:
                        take(index, self.server.accepted(answer), name, version)
                    except AbortedError as error:
                        raise BusyError(str(error)) from None
            self.server.answered()
            answered.add(index)

        def send() -> None:
            unanswered = [i for i in range(len(bodies)) if i not in answered]
            self.server.client.send_all(complete, unanswered, self.server.closed.is_set)

        self.server.retrying(send, self._restore)
        self._unload_idle()

    def _restore(self) -> None:
        """Check a server that is back, and send it the current adapters."""
        self._check_server()
        for adapter in self._adapters.current:
            self._load(adapter)


def start(
    engine: EnginePlacement, config: Config, sync_folder: Path, *, teacher: bool
) -> list[Engine]:
    """An engine for each server. Servers are contacted once the trainer's model has loaded.

    Nothing has been written to `sync_folder` by this run yet.
    """
    table = "teacher_inference" if teacher else "inference"
    command = server_command(config, engine, teacher=teacher)
    remove_leftovers(sync_folder)
    return [
        ServerEngine(
            url,
            f"{table}.server_urls",
            command,
            engine.max_length,
            sync_folder,
            config.inference.max_restarts,
            config.silence.step,
        )
        for url in engine.urls
    ]
