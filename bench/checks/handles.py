"""Check 6: weights for another process on the same GPU, through the handles of weight syncs.

It needs torch alone.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.checks.report import Findings, Setting
from minidistill.engines.vllm.weights_buffer import SendBuffer, chunked, open_buffer, views
from minidistill.placement.limits import SYNC_CHUNK_BYTES

MIB = 1 << 20
GROWTH = 64  # MiB of device memory that 200 handles may take


def check(setting: Setting, findings: Findings) -> None:
    reader = Reader(setting)
    try:
        adapter(setting, findings, reader)
        full(setting, findings, reader)
    finally:
        reader.close()


def adapter(setting: Setting, findings: Findings, reader: Reader) -> None:
    """An adapter is overwritten three times, and then sent until nothing may have grown."""
    rows, count = setting.size((2560, 252), (64, 6))
    tensors = [
        (f"{i}", torch.zeros(16, rows, device=setting.device, dtype=torch.bfloat16))
        for i in range(count)
    ]
    outbox = sender(setting)
    equal = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        for _, tensor in tensors:
            tensor.normal_()
        received = reader.read(outbox, tensors)
        equal.append(received.sums == [checksum(tensor) for _, tensor in tensors])
    findings.holds("three versions arrive as they were sent", all(equal))
    few, many = setting.size((20, 200), (3, 12))
    for number in range(1, many + 1):
        received = reader.read(outbox, tensors)
        if number == few:
            before = received, free_bytes(setting), open_files()
    findings.figure("handles", many)
    grown = (before[1] - free_bytes(setting)) / MIB
    findings.at_most(f"MiB of the device that {many - few} handles take", grown, GROWTH)
    findings.at_most("files that the sender opened", open_files() - before[2], 4)
    findings.at_most("files that the reader opened", received.files - before[0].files, 4)
    allocated = (received.allocated - before[0].allocated) / MIB
    findings.at_most("MiB that the reader allocated", allocated, 1)


def full(setting: Setting, findings: Findings, reader: Reader) -> None:
    """Every weight, 8 GB in chunks. The tensors are views of the same memory, to save memory."""
    total, chunk = setting.size((8_000_000_000, SYNC_CHUNK_BYTES), (3 * MIB, MIB))
    block = torch.randn(chunk // 8, device=setting.device).bfloat16()
    size = 2 * block.numel()
    tensors = [(f"{i}", block) for i in range(-(-total // size))]
    outbox, free = sender(setting), free_bytes(setting)
    right = True
    for attempt in range(2):  # the first one allocates
        setting.synchronize()
        began = time.perf_counter()
        for batch in chunked(tensors, 2, chunk):
            received = reader.read(outbox, batch, sums=attempt == 0)
            if attempt == 0:
                right &= received.sums == [checksum(tensor) for _, tensor in batch]
        seconds = time.perf_counter() - began
    findings.holds("every weight arrives", right)
    sent = len(tensors) * size
    findings.figure("seconds of full weights", seconds)
    findings.figure("GB", sent / 1e9)
    findings.figure("GB/s", sent / 1e9 / seconds)
    findings.at_most("seconds for 8 GB", seconds * 8e9 / sent, 2.0, gpu_only=True)
    taken = (free - free_bytes(setting)) / MIB
    # the buffer, and the reader's copy of a chunk
    findings.at_most("MiB of the device taken", taken, 2.5 * chunk / MIB + GROWTH, gpu_only=True)


def gpus(setting: Setting) -> tuple[int, ...]:
    """Those of the reader."""
    return setting.size((0,), ())


def sender(setting: Setting) -> SendBuffer:
    return SendBuffer(torch.bfloat16, setting.device, gpus(setting))


def checksum(tensor: Tensor) -> int:
    """Of the bits, so that it is exact."""
    return int(tensor.contiguous().view(torch.int16).long().sum())


def free_bytes(setting: Setting) -> int:
    """Of the device; 0 on a CPU, where other processes take memory too."""
    return torch.cuda.mem_get_info()[0] if setting.device.type == "cuda" else 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Received:
    """What the reader says after a read."""

    def __init__(self, sums: list[int], files: int, allocated: int) -> None:
        self.sums, self.files, self.allocated = sums, files, allocated


class Reader:
    """A spawned process that reads as vLLM's worker does: open, copy, answer."""

    def __init__(self, setting: Setting) -> None:
        self._gpus = gpus(setting)
        spawn = multiprocessing.get_context("spawn")
        self._pipe, remote = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(remote, str(setting.device)))
        self._process.start()

    def read(
        self, outbox: SendBuffer, tensors: Sequence[tuple[str, Tensor]], *, sums: bool = True
    ) -> Received:
        entries = outbox.pack(tensors)
        self._pipe.send((outbox.handles(self._gpus), entries, sums))
        if not self._pipe.poll(60):
            raise RuntimeError("the reader does not answer")
        return Received(*self._pipe.recv())

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def serve(pipe: Any, name: str) -> None:
    """The reader's process."""
    device = torch.device(name)
    while (message := pipe.recv()) is not None:
        handle, entries, sums = message
        copy = open_buffer(handle, device).to(device, copy=True)
        read = [checksum(tensor) for tensor in views(copy, entries).values()] if sums else []
        if device.type == "cuda":
            torch.cuda.synchronize()
        del copy
        allocated = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        pipe.send((read, open_files(), allocated))
