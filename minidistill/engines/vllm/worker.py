"""vLLM's process, started by `EngineProcess` with three file descriptors.

It answers calls over one socket, one at a time, and commands over another, between two steps of a
call, until the driver kills it or exits.
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

from minidistill.types import Advance, SamplingParams


class EngineWorker:
    """A vLLM engine and the methods that the driver calls.

    `progress` reports finished completions. `serve_commands` is called between two engine steps.
    """

    def __init__(
        self, options: dict[str, Any], progress: Advance, serve_commands: Callable[[], None]
    ) -> None:
        from vllm import LLM

        import minidistill.engines.vllm.weights_receive  # noqa: F401 - registers the weight-transfer backend

        self.llm = LLM(**options)
        self.engine: Any = self.llm.llm_engine
        self.progress, self.serve_commands = progress, serve_commands
        self.broken = False  # an error in the middle of a step leaves the engine unusable
        self.updating = False  # no call can run between the first and the last chunk of weights
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
        """The fields of a `Completion` for each prompt."""
        import vllm

        vllm_params = [
            vllm.SamplingParams(
                temperature=params.temperature,
                max_tokens=params.max_tokens,
                seed=seed,
                logprobs=params.top_ids,  # besides the sampled token's
                flat_logprobs=True,
                stop_token_ids=eos_ids,
                ignore_eos=True,  # stop at the caller's eos ids, not at vLLM's
                detokenize=False,
            )
            for seed in seeds
        ]
        completions: list[tuple[Any, ...]] = []
        for output in self._run(prompts, vllm_params, adapter, self.progress):
            sample = output.outputs[0]
            stop = "length" if sample.finish_reason == "length" else "eos"
            # a row for each token: the sampled one, then the k likeliest
            width = len(sample.logprobs.logprobs) // max(1, len(sample.token_ids))
            logprobs = tuple(sample.logprobs.logprobs[::width])
            ids = np.array(sample.logprobs.token_ids).reshape(-1, width)[:, 1:]
            versions = tuple(self._versions.pop(output.request_id))
            completions.append(
                (tuple(sample.token_ids), logprobs, stop, ids if params.top_ids else None, versions)
            )
        return completions

    def scores_ids(self) -> bool:
        """Whether any ids can be scored at each position, which only vLLM's V2 runner does."""
        return bool(getattr(self.engine.vllm_config, "use_v2_model_runner", False))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        adapters: Sequence[tuple[str, int] | None],
        ids: Sequence[Any] | None,
    ) -> list[Any]:
        """Log-probs at temperature 1 of the completions' tokens, (tokens, 1), or of `ids`.

        Reads the prefix cache. vLLM returns no valid rows for cached positions, so a sequence whose
        completion is partly cached is scored again without the cache.
        """
        if ids is None and self.scores_ids():  # computes only the rows that are needed
            ids = [np.array(completion)[:, None] for completion in completions]
        scored: dict[int, Any] = {}
        for skip_cache in (False, True):
            rows = [i for i in range(len(prompts)) if i not in scored]
            outputs = self._run(
                [[*prompts[i], *completions[i]] for i in rows],
                [
                    self._scoring_params(prompts[i], None if ids is None else ids[i], skip_cache)
                    for i in rows
                ],
                [adapters[i] for i in rows],
            )
            for row, output in zip(rows, outputs, strict=True):
                if ids is not None:
                    if output.prompt_token_id_logprobs is not None:
                        scored[row] = np.asarray(output.prompt_token_id_logprobs, np.float32)
                elif skip_cache or (output.num_cached_tokens or 0) < len(prompts[row]):
                    last = output.prompt_logprobs.logprobs[-len(completions[row]) :]
                    scored[row] = np.array(last)[:, None]
        missing = len(prompts) - len(scored)
        if missing:
            raise RuntimeError(f"vLLM gave no log-probs for {missing} of {len(prompts)} sequences")
        return [scored[i] for i in range(len(prompts))]

    def _scoring_params(self, prompt: Sequence[int], ids: Any, skip_cache: bool) -> Any:
        import vllm

        if ids is None:
            logprobs: dict[str, Any] = {"prompt_logprobs": 0, "flat_logprobs": True}
        else:
            logprobs = {"prompt_logprob_start": len(prompt) - 1, "prompt_logprob_token_ids": ids}
        return vllm.SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=skip_cache,
            **logprobs,
        )

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        adapter: Any,
        progress: Advance | None = None,
    ) -> list[Any]:
        """The finished output of each prompt. `adapter` is one for all prompts, or a list."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        adapters = adapter if isinstance(adapter, list) else [adapter] * len(prompts)
        ids: list[str] = []
        for prompt, request_params, lora in zip(prompts, params, adapters, strict=True):
            request_params.output_kind = RequestOutputKind.FINAL_ONLY
            id, tokens = f"{next(self._ids)}", {"prompt_token_ids": list(prompt)}
            # the path is part of the prefix cache's key; it is never read, the adapter is loaded
            request = lora and LoRARequest(lora[0], lora[1], lora_path=lora[0])
            try:
                self.engine.add_request(id, tokens, request_params, lora_request=request)
            except Exception:
                self.engine.abort_request(ids)
                raise
            ids.append(id)
            if progress is not None:
                self._versions[id] = [(0, self.version)]
        outputs: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            self.serve_commands()
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

        Running completions continue with it, on keys and values of the version before.
        """
        arguments = (slot, config, handle, entries)
        size = self.llm.collective_rpc("minidistill_load_adapter", args=arguments)[0]
        self._switch_to(version)
        return size

    def start_update(self) -> None:
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self.llm.start_weight_update()
        self.updating = True

    def update_weights(self, handle: Any, entries: list[Any], only: bool) -> None:
        update = {"handle": handle, "entries": entries, "only": only}
        self.llm.update_weights({"update_info": update})

    def finish_update(self, version: int) -> None:
        """Make the new weights current.

        Cached keys and values are dropped; those of running completions are recomputed.
        """
        self.llm.finish_weight_update()
        self.llm.reset_prefix_cache(reset_running_requests=True)
        self.updating = False
        self._switch_to(version)

    def _switch_to(self, version: int) -> None:
        """Record at which token running completions switch to the new version."""
        self.version = version
        for state in self.engine.output_processor.request_states.values():
            versions = self._versions.get(state.external_req_id)
            if versions is not None:
                versions.append((len(state.detokenizer.output_token_ids), version))

    def load_adapter_file(self, slot: int, path: str) -> None:
        """Load an adapter from a folder. The benchmark compares `load_adapter` with this."""
        from vllm.lora.request import LoRARequest

        self.engine.add_lora(LoRARequest("file", slot, lora_path=path, load_inplace=True))

    def reload(self, path: str) -> None:
        """Load weights from a folder. The benchmark compares `update_weights` with this."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Move the weights to host memory and drop the cache. GPUs only."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()

    def peak_memory(self) -> int:
        """The most bytes that any of the engine's processes has held so far."""
        return max(self.llm.collective_rpc("minidistill_peak_memory"))


def _die_with_driver(lifeline: int) -> None:
    """Kill this process group when the other end of the pipe closes: the driver has exited."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(calls: int, commands: int, lifeline: int) -> None:
    threading.Thread(target=_die_with_driver, args=(lifeline,), daemon=True).start()
    calls_in, commands_in = Connection(calls), Connection(commands)
    key, options = calls_in.recv()
    current_process().authkey = key
    worker: EngineWorker | None = None

    def progress(count: int) -> None:
        calls_in.send(("progress", count))

    def serve_commands() -> None:
        while worker is not None and (worker.updating or commands_in.poll()):
            serve(commands_in)

    def serve(connection: Connection) -> None:
        method, arguments = connection.recv()
        reply(connection, lambda: getattr(worker, method)(**arguments))

    def reply(connection: Connection, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            if worker is None or worker.broken:
                sys.exit(1)
        else:
            connection.send(("done", result))

    def start() -> None:
        nonlocal worker
        worker = EngineWorker(options, progress, serve_commands)

    reply(calls_in, start)
    while True:
        for ready in wait([calls_in, commands_in]):
            serve(ready)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
