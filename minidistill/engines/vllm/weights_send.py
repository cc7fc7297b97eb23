"""One copy of the weights for any number of vLLM processes, which take it over at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minidistill.engines.vllm.client import EngineDied, EngineFailed, EngineProcess
from minidistill.engines.vllm.options import Options
from minidistill.engines.vllm.weights_buffer import Entry, SendBuffer, chunked
from minidistill.placement.limits import SYNC_CHUNK_BYTES
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Role

# vLLM's adapter ids. They stay the same in a run, and adapters' names change with every version.
SLOTS = {Weights.STUDENT: 1, Weights.EMA: 2}

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Receiver:
    """A process that is sent weights."""

    process: EngineProcess
    options: Options


class WeightSender:
    """Sends the current weights to the replicas of an engine, packed once for all of them.

    A whole model is gathered and packed in chunks. The next chunk is packed when every replica has
    taken over the one before.
    """

    def __init__(self, policy: Policy, roles: Sequence[Role], replicas: Sequence[Options]) -> None:
        self.policy, self.roles = policy, tuple(roles)
        self.version: int | None = None
        """Of the weights that are sent. None before the first sync, and while the processes run a
        whole model as they loaded it."""
        self.chunk_bytes = SYNC_CHUNK_BYTES
        """The most bytes of a chunk, when a whole model's weights are sent."""
        self.bytes_packed = 0
        self._weights: Callable[[], NamedTensors] | None = None
        self._adapters = any(options.adapter for options in replicas)
        gpus = [gpu for options in replicas for gpu in options.gpu_ids]
        self._buffer = SendBuffer(policy.dtype, policy.device, gpus)

    def take(self, version: int) -> bool:
        """Make the trainer's weights of now the current ones.

        Returns whether there is anything to send: before the first step a process has the whole
        model that it loaded.
        """
        if not self.policy.lora and Role.STUDENT in self.roles:
            if version == 0:
                return False
            self._weights = self.policy.weights
        self.version = version
        return True

    def take_weights(self, version: int, weights: Callable[[], NamedTensors]) -> None:
        """Make a whole model's weights the current ones, under Hugging Face's names.

        `weights` is called for every send.
        """
        self.version, self._weights = version, weights

    @explain_out_of_memory(
        "sending weights to vLLM",
        where="inference.gpu_memory_utilization",
        fix="give the engine a smaller share of the GPU that it shares with the trainer",
    )
    def send(self, receivers: Sequence[Receiver]) -> dict[EngineProcess, Exception]:
        """Send the current weights to all receivers at once.

        Returns the errors of those that failed (EngineDied, EngineFailed). The others have the
        weights.
        """
        if self.version is None:
            return {}
        sending = _Sending(receivers)
        with self.policy.lock:
            if self._weights is not None:
                self._send_weights(sending, self._weights)
            self._send_adapters(sending)
        return sending.failures

    def _send_adapters(self, sending: _Sending) -> None:
        for weights in dict.fromkeys(map(self.policy.weights_of, self.roles)):
            if self._adapters and weights in SLOTS:
                entries = self._pack(self.policy.adapter(weights))
                arguments = {"slot": SLOTS[weights], "entries": entries, "version": self.version}

                def of_adapter(receiver: Receiver, shared: Any = arguments) -> dict[str, Any]:
                    config = receiver.options.adapter
                    return shared | {"config": config, "handle": self._handle(receiver)}

                sending.command("load_adapter", of_adapter)

    def _send_weights(self, sending: _Sending, weights: Callable[[], NamedTensors]) -> None:
        sending.command("start_update")
        chunks = chunked(weights(), self._buffer.dtype.itemsize, self.chunk_bytes)
        chunk, first = next(chunks, None), True
        while chunk is not None:
            entries = self._pack(chunk)
            # fetched only now: weights sharded over ranks are unsharded one chunk at a time
            chunk = next(chunks, None)
            only, first = first and chunk is None, False
            arguments = {"entries": entries, "only": only}

            def of_chunk(receiver: Receiver, shared: Any = arguments) -> dict[str, Any]:
                return shared | {"handle": self._handle(receiver)}

            sending.command("update_weights", of_chunk)
        sending.command("finish_update", lambda receiver: {"version": self.version})

    def _pack(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Entry]:
        entries = self._buffer.pack(tensors)
        self.bytes_packed += sum(e.count for e in entries) * self._buffer.dtype.itemsize
        return entries

    def _handle(self, receiver: Receiver) -> dict[str, bytes]:
        return self._buffer.handles(receiver.options.gpu_ids, receiver.options.workers)


class _Sending:
    """Commands to several processes at once, without those that failed."""

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = list(receivers)
        self.failures: dict[EngineProcess, Exception] = {}

    def command(
        self, method: str, arguments: Callable[[Receiver], dict[str, Any]] = lambda receiver: {}
    ) -> None:
        """Run a command in each process, at the same time. Returns when all have answered."""
        answers = []
        for receiver in self.receivers:
            try:
                answers.append(
                    (receiver, receiver.process.start_command(method, **arguments(receiver)))
                )
            except EngineDied as error:
                self.failures[receiver.process] = error
        for receiver, answer in answers:
            try:
                answer()
            except (EngineDied, EngineFailed) as error:
                self.failures[receiver.process] = error
        self.receivers = [r for r in self.receivers if r.process not in self.failures]
