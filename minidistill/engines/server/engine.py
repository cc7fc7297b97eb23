"""Sampling and scoring on an external vLLM server, on this machine or another.

Completions use the OpenAI API, token ids in and token ids out. Adapters go through a folder that
the server can read. Each version has its own name, so requests in flight finish with the version
that they named, and the version that sampled a completion is known.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import httpx

from minidistill.config import Config
from minidistill.engines.base import Engine, Finished, Ids
from minidistill.engines.server.adapters import Adapter, Adapters, remove_leftovers
from minidistill.engines.server.http import KEY, GoneError, Post, message, request, send_all
from minidistill.engines.server.probe import check_same_model, server_command
from minidistill.engines.vllm.engine import NAMES, SEED_BITS
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.placement.placement import EnginePlacement
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
Take = Callable[[int, dict[str, Any], int | None], None]
"""Takes a request's index, the answer's choice, and the version of the adapter that it used."""


class ServerEngine(Engine):
    """One running vLLM server. Two threads may call: one that samples, one that syncs.

    If the server goes away, the engine waits for it, up to `patience` seconds and `max_restarts`
    times a run. It then sends the current adapters and repeats the unanswered requests.
    """

    name = "vLLM server"
    patience = 120.0
    streams = True

    def __init__(
        self,
        url: str,
        where: str,
        command: str,
        min_length: int,
        folder: Path,
        max_restarts: int,
    ) -> None:
        """`where` is the setting that has the `url`, and `command` starts a suitable server.

        The server must allow sequences of `min_length` tokens. Adapters are written to `folder`.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.where, self.command, self.min_length = where, command, min_length
        self.max_restarts = max_restarts
        self.restarts = self._returns = 0
        self._model = ""
        self._policy: Policy | None = None
        self._adapter_weights: tuple[Weights, ...] = ()
        self._adapters = Adapters(folder)
        self._lock = threading.RLock()  # loading adapters, waiting for the server, closing
        self._closed = threading.Event()

    @property
    def location(self) -> str:
        return self.url

    @property
    def description(self) -> str:
        return f"{self.name} at {self.url}"

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        self._policy = policy
        served = dict.fromkeys(map(policy.weights_of, roles)) if policy.lora else ()
        self._adapter_weights = tuple(weights for weights in served if weights in NAMES)

    def wait_until_ready(self) -> None:
        try:
            self._check_server()
            if self._adapter_weights:
                self._check_takes_adapters()
        except GoneError as error:
            fix = f"correct the URL, or start it:\n{self.command}"
            raise self._refusal(f"cannot be reached: {error}", fix) from error

    def verify(self, trainer: Engine, temperature: float | None) -> None:
        assert self._policy is not None
        check_same_model(self, self._policy, trainer, temperature, self.where, self.command)

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
            raise ValueError("a server cannot score the likeliest ids, so it returns none")
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
        }
        bodies = [common | {"prompt": r.prompt_ids, "seed": r.seed & SEED_BITS} for r in requests]
        completions: dict[int, Completion] = {}

        def take(index: int, choice: dict[str, Any], version: int | None) -> None:
            completions[index] = Completion(
                tuple(choice["token_ids"]),
                tuple(choice["logprobs"]["token_logprobs"]),
                "length" if choice["finish_reason"] == "length" else "eos",
                versions=() if version is None else ((0, version),),
            )
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

        def take(index: int, choice: dict[str, Any], version: int | None) -> None:
            ids = completions[index]
            rows = zip(choice["prompt_logprobs"][-len(ids) :], ids, strict=True)
            scores[index] = [row[str(token)]["logprob"] for row, token in rows]

        self._complete(bodies, role, take)
        return [scores[i] for i in range(len(prompts))]

    def sync(self, version: int) -> None:
        """Send the adapters through the folder."""
        assert self._policy is not None
        for weights in self._adapter_weights:
            with self._lock:
                if self._closed.is_set():  # closed by another thread: leave nothing behind
                    return
                adapter = self._adapters.write(self._policy, weights, version)
                self._retrying(partial(self._load, adapter))
                self._adapters.switch(adapter)
        self._unload_idle()

    def close(self) -> None:
        """Cancel requests in flight. Remove this run's adapters from the server and the disk."""
        self._closed.set()
        with self._lock:
            for adapter in self._adapters.all:
                self._unload(adapter)
            self._adapters.delete()

    # -- adapters ------------------------------------------------------------------------------

    def _load(self, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
        answer = self._request("POST", "/v1/load_lora_adapter", body)
        # an earlier attempt may have arrived although its answer was lost
        if answer.status_code != HTTPStatus.OK and "already been loaded" not in message(answer):
            raise self._refusal(
                f"did not load the adapter in {adapter.path}: {message(answer)}",
                "let it read that folder (the same machine, or a shared file system), and start it "
                f"with\n{self.command}",
            )

    def _unload(self, adapter: Adapter) -> None:
        with contextlib.suppress(GoneError):  # the server is gone, and its adapters with it
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})

    def _unload_idle(self) -> None:
        for adapter in self._adapters.take_idle():
            self._unload(adapter)
            shutil.rmtree(adapter.path, ignore_errors=True)

    def _check_takes_adapters(self) -> None:
        """Check that it tries to load an adapter, with one that does not exist."""
        name = self._adapters.name("probe")
        body = {"lora_name": name, "lora_path": f"/nowhere/{name}"}
        answer = self._request("POST", "/v1/load_lora_adapter", body)
        if answer.status_code == HTTPStatus.NOT_FOUND and name in message(answer):
            return
        why = f"does not load adapters at run time: {message(answer)}"
        raise self._refusal(why, f"start it with\n{self.command}")

    # -- the server ----------------------------------------------------------------------------

    def _check_server(self) -> None:
        """Read the name of its model, and check its sequence length."""
        cards = self._checked(self._request("GET", "/v1/models")).json()["data"]
        card = next((c for c in cards if not c.get("parent")), None)
        if card is None:
            raise self._refusal("serves no model", f"start it with\n{self.command}")
        self._model = card["id"]
        length = card.get("max_model_len") or self.min_length
        if length < self.min_length:
            why = f"allows {length} tokens, the run needs {self.min_length}"
            raise self._refusal(why, f"start it with\n{self.command}")

    def _complete(self, bodies: Sequence[dict[str, Any]], role: Role, take: Take) -> None:
        """Send the requests concurrently, and `take` each answer."""
        assert self._policy is not None
        weights = self._policy.weights_of(role)
        answered: set[int] = set()
        fixed = {"add_special_tokens": False, "skip_special_tokens": False}

        async def complete(post: Post, index: int) -> None:
            with self._adapters.using(weights) as adapter:  # the latest when it is sent
                name = adapter.name if adapter else self._model
                answer = await post("/v1/completions", fixed | bodies[index] | {"model": name})
                if adapter and answer.status_code == HTTPStatus.NOT_FOUND:
                    raise GoneError(f"it was restarted: {message(answer)}")
                choice = self._checked(answer).json()["choices"][0]
                take(index, choice, adapter.version if adapter else None)
            answered.add(index)

        def send() -> None:
            unanswered = [i for i in range(len(bodies)) if i not in answered]
            send_all(self.url, complete, unanswered, self._closed.is_set)

        self._retrying(send)
        self._unload_idle()

    def _retrying(self, call: Callable[[], T]) -> T:
        """The result of `call`, retried when an unreachable server is back."""
        while True:
            seen = self._returns
            try:
                return call()
            except GoneError as error:
                with self._lock:
                    if seen == self._returns:  # else another thread has waited for it
                        self._wait_for_server(error)

    def _wait_for_server(self, error: GoneError) -> None:
        if self._closed.is_set():  # whatever the error: closing removes the adapters
            raise self._lost("this run has ended") from error
        if self.restarts >= self.max_restarts:
            times = f" (waited for it {self.restarts} times)" if self.restarts else ""
            raise self._lost(f"{error}{times}") from error
        self.restarts += 1
        logger.warning(f"the {self.description} is away ({error}): waiting for it")
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            closed = self._closed.wait(pause)
            pause = min(2 * pause, 10.0)
            try:
                self._check_server()
                for adapter in self._adapters.current:
                    self._load(adapter)
                self._returns += 1
                return
            except GoneError as still:
                if closed or time.monotonic() >= end:
                    raise self._lost(str(still)) from still

    def _lost(self, why: str) -> UserError:
        fix = "see the server's log and restart it; --resume continues from the last checkpoint"
        return self._refusal(f"has gone away: {why}", fix)

    def _refusal(self, what: str, fix: str) -> UserError:
        return UserError(
            f"the {self.description} {what}", where=self.where, fix=fix, exit_code=EXIT_ENVIRONMENT
        )

    def _request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return request(self.url, method, path, body)

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        if answer.is_server_error:
            raise GoneError(message(answer))
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            fix = f"put its API key into the environment variable {KEY}"
            raise self._refusal(f"refuses access: {message(answer)}", fix)
        raise UserError(
            f"the {self.description}: {message(answer)}",
            where=self.where,
            fix=f"start the server with\n{self.command}",
            exit_code=EXIT_FAILED,
        )


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
        )
        for url in engine.urls
    ]
