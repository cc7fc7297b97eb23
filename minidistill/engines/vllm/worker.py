"""vLLM in a process of its own, started by `EngineProcess` with three file descriptors.

It answers calls over one socket, one at a time, and commands over another, between two steps of a
call, until the driver kills it or is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing import current_process
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from minidistill.types import SamplingParams

Send = Callable[[int], None]
Attend = Callable[[], None]


class Server:
    """A vLLM engine and the calls it answers."""

    def __init__(self, options: dict[str, Any], progress: Send, attend: Attend) -> None:
        from vllm import LLM

        import minidistill.engines.vllm.weights_receive  # noqa: F401 - registers the weight-transfer backend

        self.llm = LLM(**options)
        self.engine: Any = self.llm.llm_engine
        self.progress, self.attend = progress, attend
        self.broken = False  # an error in the middle of a step leaves no state to go on from
        self.updating = False  # between the first and the last chunk of weights nothing can run
        self.version = 0
        self._versions: dict[str, list[tuple[int, int]]] = {}
        self._ids = count()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        eos_ids: list[int],
        adapter: tuple[str, int] | None,
    ) -> list[tuple[Any, ...]]:
        """Of each completion: token ids, log-probs, stop ("eos" or "length"), likeliest ids, and
        from which token on which version of the weights sampled."""
        import vllm

        vllm_params = [
            vllm.SamplingParams(
                temperature=params.temperature,
                max_tokens=params.max_tokens,
                seed=seed,
                logprobs=params.top_ids,  # and the sampled token's own
                flat_logprobs=True,
                stop_token_ids=eos_ids,
                ignore_eos=True,  # its own idea of it: the caller's alone counts
                detokenize=False,
            )
            for seed in seeds
        ]
        found = []
        for output in self._run(prompts, vllm_params, adapter, self.progress):
            sample = output.outputs[0]
            stop = "length" if sample.finish_reason == "length" else "eos"
            # a row for each token: the sampled one, then the k likeliest
            width = len(sample.logprobs.logprobs) // max(1, len(sample.token_ids))
            logprobs = tuple(sample.logprobs.logprobs[::width])
            ids = np.array(sample.logprobs.token_ids).reshape(-1, width)[:, 1:]
            versions = tuple(self._versions.pop(output.request_id))
            found.append(
                (tuple(sample.token_ids), logprobs, stop, ids if params.top_ids else None, versions)
            )
        return found

    def scores_ids(self) -> bool:
        """Whether any ids can be scored at each position: the V2 runner's call."""
        return bool(getattr(self.engine.vllm_config, "use_v2_model_runner", False))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        adapters: Sequence[tuple[str, int] | None],
        ids: Sequence[Any] | None,
    ) -> list[Any]:
        """Log-probs at temperature 1 of the completions' tokens, (tokens, 1), or of `ids` there.

        Reads the prefix cache. vLLM returns no valid rows for cached positions, so where the cache
        reaches into the completion the sequence is scored again without it.
        """
        if ids is None and self.scores_ids():  # which computes no other rows than asked for
            ids = [np.array(completion)[:, None] for completion in completions]
        found: dict[int, Any] = {}
        for skip in (False, True):
            rows = [i for i in range(len(prompts)) if i not in found]
            outputs = self._run(
                [[*prompts[i], *completions[i]] for i in rows],
                [self._scoring(prompts[i], None if ids is None else ids[i], skip) for i in rows],
                [adapters[i] for i in rows],
            )
            for row, output in zip(rows, outputs, strict=True):
                if ids is not None:
                    if output.prompt_token_id_logprobs is not None:
                        found[row] = np.asarray(output.prompt_token_id_logprobs, np.float32)
                elif skip or (output.num_cached_tokens or 0) < len(prompts[row]):
                    last = output.prompt_logprobs.logprobs[-len(completions[row]) :]
                    found[row] = np.array(last)[:, None]
        missing = len(prompts) - len(found)
        if missing:
            raise RuntimeError(f"vLLM gave no log-probs for {missing} of {len(prompts)} sequences")
        return [found[i] for i in range(len(prompts))]

    def _scoring(self, prompt: Sequence[int], ids: Any, skip: bool) -> Any:
        import vllm

        if ids is None:
            how: dict[str, Any] = {"prompt_logprobs": 0, "flat_logprobs": True}
        else:
            how = {"prompt_logprob_start": len(prompt) - 1, "prompt_logprob_token_ids": ids}
        return vllm.SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=skip, **how
        )

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        adapter: Any,
        progress: Send | None = None,
    ) -> list[Any]:
        """The finished output of each prompt. `adapter` is one for all, or a list."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        adapters = adapter if isinstance(adapter, list) else [adapter] * len(prompts)
        ids: list[str] = []
        for prompt, own, lora in zip(prompts, params, adapters, strict=True):
            own.output_kind = RequestOutputKind.FINAL_ONLY
            id, tokens = f"{next(self._ids)}", {"prompt_token_ids": list(prompt)}
            # the path is part of the prefix cache's key and leads nowhere: the adapter is loaded
            request = lora and LoRARequest(lora[0], lora[1], lora_path=lora[0])
            try:
                self.engine.add_request(id, tokens, own, lora_request=request)
            except Exception:
                self.engine.abort_request(ids)
                raise
            ids.append(id)
            if progress is not None:
                self._versions[id] = [(0, self.version)]
        outputs: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            self.attend()
            try:
                done = [output for output in self.engine.step() if output.finished]
            except Exception:
                self.broken = True
                raise
            outputs |= {output.request_id: output for output in done}
            if done and progress is not None:
                progress(len(done))
        return [outputs[id] for id in ids]

    def load_adapter(
        self, slot: int, config: dict[str, Any], handle: Any, entries: list[Any], version: int
    ) -> int:
        """Replace the adapter in a slot; returns the bytes read.

        Completions at hand go on with it, after keys and values of the one before.
        """
        arguments = (slot, config, handle, entries)
        size = self.llm.collective_rpc("minidistill_load_adapter", args=arguments)[0]
        self._now(version)
        return size

    def start_update(self) -> None:
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self.llm.start_weight_update()
        self.updating = True

    def update_weights(self, handle: Any, entries: list[Any], only: bool) -> None:
        update = {"handle": handle, "entries": entries, "only": only}
        self.llm.update_weights({"update_info": update})

    def finish_update(self, version: int) -> None:
        """Make the new weights current. Keys and values of the old ones are dropped, those of
        completions at hand are computed again."""
        self.llm.finish_weight_update()
        self.llm.reset_prefix_cache(reset_running_requests=True)
        self.updating = False
        self._now(version)

    def _now(self, version: int) -> None:
        """Note where completions at hand change from one version to the next."""
        self.version = version
        for state in self.engine.output_processor.request_states.values():
            versions = self._versions.get(state.external_req_id)
            if versions is not None:
                versions.append((len(state.detokenizer.output_token_ids), version))

    def load_adapter_file(self, slot: int, path: str) -> None:
        """An adapter from a folder, in place: what the benchmark compares `load_adapter` with."""
        from vllm.lora.request import LoRARequest

        self.engine.add_lora(LoRARequest("file", slot, lora_path=path, load_inplace=True))

    def reload(self, path: str) -> None:
        """Weights from a folder, in place: what the benchmark compares `update_weights` with."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Weights to host memory, keys and values dropped. GPUs only."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()


def _end_with(lifeline: int) -> None:
    """End this process group when the other end of the pipe closes: the driver is gone."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(calls: int, commands: int, lifeline: int) -> None:
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    connection, side = Connection(calls), Connection(commands)
    key, options = connection.recv()
    current_process().authkey = key
    server: Server | None = None

    def progress(done: int) -> None:
        connection.send(("progress", done))

    def attend() -> None:
        while server is not None and (server.updating or side.poll()):
            serve(side)

    def serve(on: Connection) -> None:
        method, arguments = on.recv()
        answer(on, lambda: getattr(server, method)(**arguments))

    def answer(on: Connection, act: Callable[[], Any]) -> None:
        try:
            found = act()
        except Exception as error:
            traceback.print_exc()
            on.send(("failed", f"{type(error).__name__}: {error}"))
            if server is None or server.broken:
                sys.exit(1)
        else:
            on.send(("done", found))

    def begin() -> None:
        nonlocal server
        server = Server(options, progress, attend)

    answer(connection, begin)
    while True:
        for ready in wait([connection, side]):
            serve(ready)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
