"""Sampling and scoring in vLLM, in a process that holds one base model for both roles.

The driver does not import vLLM. In one batch the student's rows name the adapter and the frozen
teacher's rows name none. Every version of an adapter has a new name, because vLLM's prefix cache is
keyed by it: the base's cached context stays valid, and an old version's cache is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import (
    Engine,
    EngineCapabilities,
    Finished,
    Ids,
    Sampled,
    not_finite_error,
)
from minidistill.engines.replicas import Replicas
from minidistill.engines.vllm.client import EngineProcess, RestartingProcess
from minidistill.engines.vllm.options import Options, build_options
from minidistill.engines.vllm.probe import check_runs
from minidistill.engines.vllm.weights_send import SLOTS, NamedTensors, Receiver, WeightSender
from minidistill.placement.placement import EnginePlacement
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import (
    Advance,
    Completion,
    Request,
    Role,
    SamplingParams,
    TeacherScores,
)

NAMES = {Weights.STUDENT: "student", Weights.EMA: "teacher"}
SEED_BITS = (1 << 63) - 1  # vLLM takes signed 64-bit seeds


class VllmEngine(Engine):
    """One vLLM engine. Its process starts at once and is waited for at the first call.

    A dead process restarts with the current weights and the call is retried, up to `max_restarts`
    times a run.
    """

    streams = True
    ends_in_order = True

    def __init__(self, options: Options, max_restarts: int) -> None:
        self.options = options
        self.name = f"vLLM {options.vllm_version}"
        self.sender: WeightSender | None = None
        """Sends it the weights. Replicas share one."""
        self._asleep = False
        self._scored = self._repeated = 0

        def start() -> EngineProcess:
            self._asleep = False
            return EngineProcess(options.arguments, options.environment, options.silence)

        self.restarting = RestartingProcess(start, self._send, max_restarts)

    @property
    def location(self) -> str:
        ids = self.options.gpu_ids
        return f"GPU {', '.join(map(str, ids))}" if ids else "the CPU"

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(scores_ids=self._call("scores_ids"))

    @property
    def sleeps(self) -> bool:
        return self.options.sleeps

    @property
    def scores_while_sampling(self) -> bool:
        return self.sender is not None and Role.TEACHER in self.sender.roles

    @property
    def score_counts(self) -> tuple[int, int]:
        return self._scored, self._repeated

    @property
    def process(self) -> EngineProcess:
        """The engine's current process."""
        return self.restarting.process

    @property
    def restarts(self) -> int:
        """How often the process was restarted."""
        return self.restarting.restarts

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        self.sender = WeightSender(policy, roles, [self.options])

    def wait_until_ready(self) -> None:
        self.restarting.call(lambda: None)

    def verify(self, trainer: Engine, temperature: float | None) -> None:
        assert self.sender is not None
        check_runs(self, self.sender.policy, trainer, temperature)
        self.sleep()

    # -- sampling and scoring ------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        steps = 0
        broken: int | None = None  # a request whose log-probs are not finite

        def generate() -> None:
            # a restarted process samples what had not finished
            rows = [i for i in range(len(requests)) if i not in completions]
            before = steps

            def take(report: tuple[int, list[Any]]) -> None:
                nonlocal broken, steps
                steps = before + report[0]
                ended: list[Sampled] = []
                for row, fields, scores, repeated in report[1]:
                    completion = completions[rows[row]] = Completion(*fields)
                    self._scored += scores is not None
                    self._repeated += repeated
                    if not all(map(math.isfinite, completion.logprobs)):
                        broken = rows[row]
                    ended.append((rows[row], completion, _teacher_scores(scores, params)))
                if advance is not None and ended:
                    advance(len(ended))
                if finished is not None and broken is None:
                    finished(steps, ended)

            asked = [requests[i] for i in rows]
            scored = any(r.teacher_ids for r in asked)
            self._wake()
            self.process.call(
                "generate",
                take,
                prompts=[r.prompt_ids for r in asked],
                seeds=[r.seed & SEED_BITS for r in asked],
                params=params,
                eos_ids=sorted(self.sender.policy.eos_ids) if self.sender else [],
                adapter=self._adapter(role),
                teacher_prompts=[r.teacher_ids for r in asked] if scored else None,
                teacher_adapter=self._adapter(Role.TEACHER) if scored else None,
                # vLLM would sample its whole queue before it scored the first completion
                at_once=self.options.arguments["max_num_seqs"] if scored else None,
            )

        if any(r.teacher_ids for r in requests) and not self.scores_while_sampling:
            raise ValueError(f"{self.name} does not serve the teacher")
        self.restarting.call(generate)
        if broken is not None:
            raise not_finite_error(self, broken)
        return [completions[i] for i in range(len(requests))]

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        return self.score_rows(prompts, completions, [role] * len(prompts), temperature)

    def score_rows(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        roles: Sequence[Role],
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """`score` with a role for each row: student and teacher in one batch."""
        if temperature != 1:
            raise ValueError("vLLM scores given tokens at temperature 1 only")
        rows = self._score(prompts, completions, [self._adapter(role) for role in roles])
        return [row[:, 0].tolist() for row in rows]

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        adapters = [self._adapter(role)] * len(prompts)
        return self._score(prompts, completions, adapters, ids)

    def _score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        adapters: Sequence[tuple[str, int] | None],
        ids: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        scores, repeated = self._call(
            "score",
            prompts=[tuple(p) for p in prompts],
            completions=[tuple(c) for c in completions],
            adapters=list(adapters),
            ids=ids,
        )
        self._scored += len(scores)
        self._repeated += repeated
        return scores

    def _adapter(self, role: Role) -> tuple[str, int] | None:
        """The name and the slot of the role's adapter; None if the role runs the base."""
        if self.sender is None or not self.options.adapter:
            return None
        weights = self.sender.policy.weights_of(role)
        if weights not in SLOTS:
            return None
        assert self.sender.version is not None, "no adapter before the first sync"
        return f"{NAMES[weights]}-v{self.sender.version}", SLOTS[weights]

    # -- weights -------------------------------------------------------------------------------

    def sync(self, version: int) -> None:
        """Send the adapters' tensors or the whole model's, in memory."""
        assert self.sender is not None
        if self.sender.take(version):
            send_current([self])

    def sync_weights(self, version: int, weights: Callable[[], NamedTensors]) -> None:
        """Send a whole model's weights, under Hugging Face's names, in bounded chunks.

        `weights` is kept, and called again if the process restarts.
        """
        assert self.sender is not None
        self.sender.take_weights(version, weights)
        send_current([self])

    def _send(self) -> None:
        """Send the current weights to a new process."""
        if self.sender is not None:
            for error in self.sender.send([Receiver(self.process, self.options)]).values():
                raise error

    # -- its process ---------------------------------------------------------------------------

    def sleep(self) -> None:
        """On a GPU shared with the trainer, free its memory. The next call wakes it."""
        if self.options.sleeps and self.restarting.ready and not self._asleep:
            self._call("sleep")
            self._asleep = True

    def peak_memory(self) -> int | None:
        return self.restarting.call(lambda: self.process.command("peak_memory"))

    def close(self) -> None:
        self.restarting.close()

    def _call(self, method: str, **arguments: Any) -> Any:
        def call() -> Any:
            self._wake()
            return self.process.call(method, **arguments)

        return self.restarting.call(call)

    def wake(self) -> None:
        if self._asleep:
            self.restarting.call(self._wake)

    def _wake(self) -> None:
        if self._asleep:
            if self.sender is not None:  # the engine needs the memory that torch caches
                self.sender.policy.free_cached_memory()
            self.process.call("wake")
            self._asleep = False


def send_current(engines: Sequence[VllmEngine]) -> None:
    """Send the current weights at the same time to engines that share a sender.

    A process that has died is restarted, and gets the weights then. So does one that is starting.
    """
    for engine in engines:
        engine.wake()
    receivers = {e: Receiver(e.process, e.options) for e in engines if e.restarting.ready}
    sender = engines[0].sender
    assert sender is not None
    failures = sender.send(list(receivers.values()))
    for engine, receiver in receivers.items():

        def recover(engine: VllmEngine = engine, process: EngineProcess = receiver.process) -> None:
            if process in failures and engine.process is process:
                raise failures[process]

        engine.restarting.call(recover)


class VllmReplicas(Replicas):
    """Replicas of one vLLM engine, which are sent the same copy of the weights."""

    def __init__(self, replicas: Sequence[VllmEngine]) -> None:
        super().__init__(replicas)
        self.replicas = replicas

    def attach(self, policy: Policy, roles: Sequence[Role]) -> None:
        sender = WeightSender(policy, roles, [replica.options for replica in self.replicas])
        for replica in self.replicas:
            replica.sender = sender

    def sync(self, version: int) -> None:
        """Send the adapters' tensors or the whole model's to all replicas at once, in memory."""
        sender = self.replicas[0].sender
        assert sender is not None
        if sender.take(version):
            self.wake()  # at once: waking takes long
            send_current(self.replicas)


def _teacher_scores(scores: np.ndarray | None, params: SamplingParams) -> TeacherScores | None:
    """From log-probs (tokens, 1 + k) of the sampled token and of the k most likely ids."""
    if scores is None:
        return None
    return TeacherScores(scores[:, 0].tolist(), scores[:, 1:] if params.top_ids else None)


def start(
    engine: EnginePlacement, config: Config, sync_folder: Path, *, teacher: bool
) -> list[Engine]:
    """Start the replicas' processes. Weights reach them in memory, not through `sync_folder`."""
    replicas: list[VllmEngine] = []
    try:
        for gpus in engine.replicas:
            options = build_options(config, engine, gpus, teacher=teacher)
            replicas.append(VllmEngine(options, config.inference.max_restarts))
        if engine.gpus:  # vLLM measures free memory, which other starts would change
            for replica in replicas:
                replica.wait_until_ready()
    except BaseException:
        for replica in replicas:
            replica.close()
        raise
    return [VllmReplicas(replicas)] if len(replicas) > 1 else [*replicas]
