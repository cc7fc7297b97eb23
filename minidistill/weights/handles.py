"""Tensors for another process of this machine: one flat buffer, a handle to it, its contents.

The handle is torch's own for sharing between processes: a file descriptor of shared memory on a CPU
(fetched once, from this process, under multiprocessing's authentication key), a CUDA IPC handle on
a GPU. Unpickling runs code, so handles only travel to a process that this one started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # teaches ForkingPickler about tensors
from torch import Tensor

CHUNK_BYTES = 1 << 30  # of a full-weight sync: what the trainer sets aside for it


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a buffer: its name, shape, and where it starts, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Outbox:
    """A buffer of one dtype on the trainer's device, filled anew for every version.

    What was sent may be overwritten by the next `pack`, so a receiver copies before it answers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    @torch.no_grad()
    def pack(self, tensors: Sequence[tuple[str, Tensor]]) -> list[Entry]:
        """Copy the tensors in, cast to the buffer's dtype."""
        entries, end = [], 0
        for name, tensor in tensors:
            entries.append(Entry(name, tuple(tensor.shape), end))
            end += tensor.numel()
        if end > self._buffer.numel():
            self._buffer = torch.empty(end, dtype=self.dtype, device=self.device)
            if self.device.type == "cpu":
                self._buffer.share_memory_()
        for entry, (_, tensor) in zip(entries, tensors, strict=True):
            place = self._buffer[entry.offset : entry.offset + entry.count]
            place.view(entry.shape).copy_(tensor)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return entries

    def handle(self) -> bytes:
        """A handle to the buffer, for one receiver and one opening."""
        return bytes(ForkingPickler.dumps(self._buffer))

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes


def opened(handle: bytes) -> Tensor:
    """The buffer behind a handle, flat, shared with the sender: clone what is to be kept."""
    return ForkingPickler.loads(handle)


def views(buffer: Tensor, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The buffer's tensors by name, without copying."""
    return {e.name: buffer[e.offset : e.offset + e.count].view(e.shape) for e in entries}


def chunked(
    tensors: Iterable[tuple[str, Tensor]], itemsize: int, limit: int = CHUNK_BYTES
) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in order, in runs of at most `limit` bytes (a larger one alone)."""
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        own = tensor.numel() * itemsize
        if batch and size + own > limit:
            yield batch
            batch, size = [], 0
        batch.append((name, tensor))
        size += own
    if batch:
        yield batch
