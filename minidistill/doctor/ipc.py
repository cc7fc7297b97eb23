"""Weights reach another process through a handle, as they reach vLLM in a sync."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch

from minidistill.doctor.result import Result, failed, passed
from minidistill.engines.vllm.weights_buffer import SendBuffer, open_buffer

SIZE = 1 << 20
SECONDS = 120.0
FIX = "in a container, start it with --ipc=host; on a GPU that is shared by virtual machines or "
FIX += 'MIG, use inference.engine = "embedded"'


def round_trip() -> Result:
    """Write a buffer, read it in another process, overwrite it, and read it there again."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    kind = "a CUDA IPC handle" if on_gpu else "shared memory"
    context = multiprocessing.get_context("spawn")
    buffer = SendBuffer(torch.float32, device, (0,) if on_gpu else ())
    weights = torch.arange(SIZE, dtype=torch.float32, device=device)
    buffer.pack([("weights", weights)])
    ours, theirs = context.Pipe()
    reader = context.Process(
        target=_read, args=(theirs, buffer.handles((0,) if on_gpu else ()), str(device))
    )
    reader.start()
    theirs.close()
    try:
        received = [_receive(ours)]
        buffer.pack([("weights", weights.flip(0) + 1)])
        ours.send("again")
        received.append(_receive(ours))
        reader.join(SECONDS)
    finally:
        reader.kill()
    expected = [(0.0, SIZE - 1.0), (float(SIZE), 1.0)]
    if received != expected:
        return failed(f"{kind}: another process reads {received} and not {expected}", FIX)
    return passed(f"{kind}: another process reads what is written, twice")


def _receive(connection: Any) -> Any:
    if not connection.poll(SECONDS):
        raise TimeoutError("the other process does not answer")
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError("the other process has ended") from None
    if isinstance(answer, str):
        raise RuntimeError(f"the other process: {answer}")
    return answer


def _read(connection: Any, handle: dict[str, bytes], device: str) -> None:
    """The other process: sends the first and the last number, twice."""
    try:
        buffer = open_buffer(handle, torch.device(device))
        connection.send((float(buffer[0]), float(buffer[-1])))
        connection.recv()
        connection.send((float(buffer[0]), float(buffer[-1])))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
