"""vLLM's process, started by `EngineProcess` with two file descriptors.

It answers calls over one socket, one at a time, and commands over another, between two steps of a
call, until the driver kills it or exits.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from multiprocessing import current_process
from multiprocessing.connection import Connection, wait
from operator import itemgetter
from typing import Any

import numpy as np
from pydantic import ValidationError

from minidistill.types import SamplingParams

REPORTED_STEPS = 8
"""Every so many steps are reported if nothing ends too: replicas wait for each other's steps."""
SIGN_SECONDS = 1.0
"""Between two signs that a call goes on: the driver gives up a process without any."""
Adapter = tuple[str, int] | None
"""An adapter's name and slot; None for the base."""


class EngineWorker:
    """A vLLM engine and the methods that the driver calls.

    `report` sends the driver a result before the call returns, or None as a sign that it goes on.
    `serve_commands` is called between two engine steps.
    """

    def __init__(
        self,
        options: dict[str, Any],
        report: Callable[[Any], None],
        serve_commands: Callable[[], None],
    ) -> None:
        from vllm import LLM

        # the second registers the weight-transfer backend
        from minidistill.engines.vllm import prefix_limit, weights_receive  # noqa: F401

        self.limit_prefix = prefix_limit.arguments
        self.llm = LLM(**options)
        self.engine: Any = self.llm.llm_engine
        self.report, self.serve_commands = report, serve_commands
        self.broken = False  # an error in the middle of a step leaves the engine unusable
        self.updating = False  # no call can run between the first and the last chunk of weights
        self.version = 0
        self._versions: dict[str, list[tuple[int, int]]] = {}
        self._done: dict[str, Callable[[Any], None]] = {}  # takes an unfinished request's output
        self._ids = count()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        eos_ids: list[int],
        adapter: Adapter,
        teacher_prompts: Sequence[Sequence[int]] | None = None,
        teacher_adapter: Adapter = None,
        at_once: int | None = None,
    ) -> None:
        """Report what has ended after an engine step: the step's number, and for each prompt its
        row, the fields of a `Completion`, the teacher's scores (None without `teacher_prompts`),
        and whether they were computed twice.

        At most `at_once` prompts are sampled at a time. A completion is scored before the next of
        those that wait is sampled. Which step does what does not depend on timing.
        """
        import vllm

        waiting, ended = deque(range(len(prompts))), []

        def end(row: int, fields: tuple[Any, ...], scores: Any = None, twice: bool = False) -> None:
            ended.append((row, fields, scores, twice))

        def report(step: int) -> None:
            if ended or step % REPORTED_STEPS == 0:
                self.report((step, sorted(ended, key=itemgetter(0))))
                ended.clear()

        def sample_next() -> None:
            row = waiting.popleft()
            request_params = vllm.SamplingParams(
                temperature=params.temperature,
                max_tokens=params.max_tokens,
                seed=seeds[row],
                logprobs=params.top_ids,  # besides the sampled token's
                flat_logprobs=True,
                stop_token_ids=eos_ids,
                ignore_eos=True,  # stop at the caller's eos ids, not at vLLM's
                detokenize=False,
            )
            id = self._submit(prompts[row], request_params, adapter, partial(sampled, row))
            self._versions[id] = [(0, self.version)]

        def sampled(row: int, output: Any) -> None:
            fields = self._completion(output, params.top_ids)
            if teacher_prompts is None:
                end(row, fields)
            else:
                tokens, top_ids = fields[0], fields[3]
                ids = np.array(tokens)[:, None]
                if top_ids is not None:
                    ids = np.c_[ids, top_ids]
                done = partial(end, row, fields)
                self._submit_scoring(teacher_prompts[row], tokens, ids, teacher_adapter, done)
            if waiting:
                sample_next()

        def submit() -> None:
            for _ in range(min(len(prompts), at_once or len(prompts))):
                sample_next()

        self._run(submit, report)

    def _completion(self, output: Any, top_ids: int) -> tuple[Any, ...]:
        """The fields of a `Completion`."""
        sample = output.outputs[0]
        stop = "length" if sample.finish_reason == "length" else "eos"
        # a row for each token: the sampled one, then the k most likely
        width = len(sample.logprobs.logprobs) // max(1, len(sample.token_ids))
        logprobs = tuple(sample.logprobs.logprobs[::width])
        ids = np.array(sample.logprobs.token_ids).reshape(-1, width)[:, 1:]
        versions = tuple(self._versions.pop(output.request_id))
        return tuple(sample.token_ids), logprobs, stop, ids if top_ids else None, versions

    def scores_ids(self) -> bool:
        """Whether any ids can be scored at each position, which only vLLM's V2 runner does."""
        return bool(getattr(self.engine.vllm_config, "use_v2_model_runner", False))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        adapters: Sequence[Adapter],
        ids: Sequence[Any] | None,
    ) -> tuple[list[Any], int]:
        """Log-probs at temperature 1 of the completions' tokens, (tokens, 1), or of `ids`.

        Also returns how many of the sequences were computed twice.
        """
        scored: dict[int, Any] = {}
        repeated = 0

        def done(row: int, scores: Any, twice: bool) -> None:
            nonlocal repeated
            scored[row] = scores
            repeated += twice

        def submit() -> None:
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                asked = np.array(completion)[:, None] if ids is None else ids[row]
                self._submit_scoring(prompt, completion, asked, adapters[row], partial(done, row))

        self._run(submit)
        return [scored[row] for row in range(len(prompts))], repeated

    def _submit_scoring(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        ids: Any,
        adapter: Adapter,
        done: Callable[[Any, bool], None],
        repeat: bool = False,
    ) -> None:
        """Ask for log-probs (tokens, k) of `ids` at the completion's tokens.

        `done` takes them, and whether the sequence was computed twice. Reads the prefix cache up to
        the first of these rows, because vLLM returns no valid rows for cached positions. If it has
        read further, the sequence is scored again without the cache. Without the V2 runner `ids`
        must be the completion's own tokens.
        """
        import vllm

        chosen = self.scores_ids()  # computes only the rows that are needed
        if chosen:
            logprobs: dict[str, Any] = {
                "prompt_logprob_start": len(prompt) - 1,
                "prompt_logprob_token_ids": ids,
            }
        else:
            logprobs = {"prompt_logprobs": 0, "flat_logprobs": True}
        params = vllm.SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=repeat,
            extra_args=self.limit_prefix(len(prompt) - 1),
            **logprobs,
        )

        def finished(output: Any) -> None:
            scores = None
            if chosen:
                if output.prompt_token_id_logprobs is not None:
                    scores = np.asarray(output.prompt_token_id_logprobs, np.float32)
            elif repeat or (output.num_cached_tokens or 0) < len(prompt):
                scores = np.array(output.prompt_logprobs.logprobs[-len(completion) :])[:, None]
            if scores is not None:
                done(scores, repeat)
            elif repeat:
                raise RuntimeError("vLLM gave no log-probs for a sequence")
            else:
                self._submit_scoring(prompt, completion, ids, adapter, done, repeat=True)

        self._submit([*prompt, *completion], params, adapter, finished)

    def _submit(
        self, prompt: Sequence[int], params: Any, adapter: Adapter, done: Callable[[Any], None]
    ) -> str:
        """Queue a request. `done` takes its output when it has finished. Returns its id."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        id, tokens = f"{next(self._ids)}", {"prompt_token_ids": list(prompt)}
        # the path is part of the prefix cache's key; it is never read, the adapter is loaded
        request = adapter and LoRARequest(adapter[0], adapter[1], lora_path=adapter[0])
        self.engine.add_request(id, tokens, params, lora_request=request)
        self._done[id] = done
        return id

    def _run(
        self, submit: Callable[[], None], stepped: Callable[[int], None] = lambda step: None
    ) -> None:
        """Submit requests, and step until they and those that they led to have finished.

        `stepped` is called with the number of each step.
        """
        signed = time.monotonic()
        try:
            submit()
            for step in count(1):
                if not self._done:
                    break
                self.serve_commands()
                try:
                    outputs = self.engine.step()
                except Exception:
                    self.broken = True
                    raise
                for output in outputs:
                    if output.finished:
                        self._done.pop(output.request_id)(output)
                stepped(step)
                if time.monotonic() >= signed + SIGN_SECONDS:
                    self.report(None)
                    signed = time.monotonic()
        except Exception:
            if not self.broken:
                self.engine.abort_request([*self._done])
            self._done.clear()
            self._versions.clear()
            raise

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


def main(calls: int, commands: int) -> None:
    calls_in, commands_in = Connection(calls), Connection(commands)
    key, options = calls_in.recv()
    current_process().authkey = key
    worker: EngineWorker | None = None

    def report(value: Any) -> None:
        calls_in.send(("report", value))

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
            connection.send(("failed", f"{type(error).__name__}: {_reason(error)}"))
            if worker is None or worker.broken:
                sys.exit(1)
        else:
            connection.send(("done", result))

    def start() -> None:
        nonlocal worker
        worker = EngineWorker(options, report, serve_commands)

    reply(calls_in, start)
    while True:
        for ready in wait([calls_in, commands_in]):
            serve(ready)  # type: ignore[arg-type]


def _reason(error: Exception) -> str:
    """The message. Only its first line is shown, which pydantic's would not say."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
