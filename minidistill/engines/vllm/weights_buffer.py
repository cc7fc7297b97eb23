"""Weights for vLLM's process: one flat buffer, handles to it, and a description of its contents.

Handles are torch's, for sharing memory between processes. On a CPU a handle is a file descriptor of
shared memory, fetched once from this process under multiprocessing's authentication key. On a GPU
it is a CUDA IPC handle, which opens only on the buffer's GPU. For workers on other GPUs the buffer
is first copied there. Unpickling runs code, so handles are sent only to processes that this one
started.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a buffer: its name, shape, and where it starts, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class SendBuffer:
    """A buffer of one dtype on the trainer's device, refilled for every version.

    `gpus` are those of all workers that read it, of any number of engines. The next `pack`
    overwrites the buffer, so a receiver copies from it before it answers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, gpus: Iterable[int] = ()) -> None:
        self.dtype, self.device = dtype, device
        self.readers = [torch.device("cuda", gpu) for gpu in dict.fromkeys(gpus)]
        self._buffer = torch.empty(0, dtype=dtype, device=device)
        self._staged: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> list[Entry]:
        """Copy the tensors into the buffer, cast to its dtype, and to the GPUs that read it."""
        entries, end = [], 0
        for name, tensor in tensors:
            entries.append(Entry(name, tuple(tensor.shape), end))
            end += tensor.numel()
        if end > self._buffer.numel():
            self._buffer = torch.empty(end, dtype=self.dtype, device=self.device)
            if self.device.type == "cpu":
                self._buffer.share_memory_()
            self._staged = {
                reader: torch.empty_like(self._buffer, device=reader)
                for reader in self.readers
                if reader != self.device
            }
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            region = self._buffer[entry.offset : entry.offset + entry.count]
            region.view(entry.shape).copy_(tensor)
        for staged in self._staged.values():
            staged[:end].copy_(self._buffer[:end])
        for device in {self.device, *self._staged}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return entries

    def handles(self, gpus: Sequence[int] = (), workers: int = 1) -> dict[str, bytes]:
        """A handle for each worker of one engine, by the worker's address. Each opens once.

        The engine has a worker on each of `gpus`; on a CPU there are `workers` of them.
        """
        if self.device.type == "cpu":
            return {str(n): bytes(ForkingPickler.dumps(self._buffer)) for n in range(workers)}
        readers = [torch.device("cuda", gpu) for gpu in gpus]
        buffers = [self._staged.get(reader, self._buffer) for reader in readers]
        return {_gpu(b.device): pickle.dumps(reduce_tensor(b)[1]) for b in buffers}


def _gpu(device: torch.device) -> str:
    """A GPU's identifier in every process, whatever its index there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def open_buffer(handle: dict[str, bytes], device: torch.device, rank: int = 0) -> Tensor:
    """The flat buffer behind a worker's handle. The sender overwrites it later.

    `device` is the worker's, `rank` its index among the workers of its engine.
    """
    if device.type == "cpu":
        return ForkingPickler.loads(handle[str(rank)])
    arguments = list(pickle.loads(handle[_gpu(device)]))
    arguments[6] = device.index  # the GPU's index in the sender's process
    return rebuild_cuda_tensor(*arguments)


def views(buffer: Tensor, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The buffer's tensors by name, without copying."""
    return {e.name: buffer[e.offset : e.offset + e.count].view(e.shape) for e in entries}


def chunked(
    tensors: Iterable[tuple[str, Tensor]], itemsize: int, limit: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in order, in chunks of at most `limit` bytes (a larger tensor alone)."""
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * itemsize
        if batch and size + nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append((name, tensor))
        size += nbytes
    if batch:
        yield batch
