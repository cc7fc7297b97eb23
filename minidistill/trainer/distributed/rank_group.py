"""The trainer's ranks as one group: who this one is, and what they tell each other.

The driver is rank 0. What several ranks must do together, they do by calling the same method: the
driver says which (`World.together`), the others wait for it (`World.next`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minidistill.errors import UserError

STEP_TIMEOUT = timedelta(minutes=30)  # how much longer one rank may compute than another
IDLE_TIMEOUT = timedelta(days=30)  # ranks wait as long as the driver samples and evaluates
JOIN_TIMEOUT = timedelta(minutes=5)
BUCKET_BYTES = 256 << 20  # of gradients summed at a time
GRACE = 5.0  # seconds between a rank's connection and its process ending


def launched() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, where torchrun started several of them."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names) or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class World:
    """Rank `rank` of `size`. A rank alone needs no process group and waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.fallen: Callable[[float], UserError | None] = lambda seconds: None
        """The driver's: what to raise where a rank has ended, or does within some seconds."""
        self.notes: list[str] = []
        """What this rank would warn of, for the driver to say."""
        self.broken = False
        """An error left the ranks in different places, so that nothing can be asked of them."""
        self._lock, self._depth, self._threads = threading.RLock(), 0, 0
        self._commands: Any = None

    def join(self, device: torch.device, store: Path | None) -> None:
        """Meet the other ranks: through a file on one machine, else as torchrun says.

        On a GPU tensors go over nccl; objects always go over gloo.
        """
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        with contextlib.ExitStack() as stack:
            arguments: dict[str, Any] = {"init_method": "env://"}
            if store is not None:
                stack.enter_context(_loopback())
                file = dist.FileStore(str(store), self.size)
                file.set_timeout(JOIN_TIMEOUT)
                arguments = {"store": file}
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend, rank=self.rank, world_size=self.size, timeout=STEP_TIMEOUT, **arguments
            )
            self._commands = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        if device.type == "cpu" and store is not None:  # the ranks share the machine's cores
            self._threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads // self.size))

    def leave(self) -> None:
        """Part from the others, without waiting for those that are gone."""
        if self._commands is None:
            return
        if self.broken and torch.cuda.is_available():
            self.abort()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        self._commands = None
        if self._threads:
            torch.set_num_threads(self._threads)

    def abort(self) -> None:
        """End what waits on a GPU for a rank that is gone: unlike gloo, nccl does not notice."""
        with contextlib.suppress(Exception):
            dist.distributed_c10d._abort_process_group()

    # -- the same method on every rank ---------------------------------------------------------

    @contextlib.contextmanager
    def together(self, name: str, *arguments: Any) -> Iterator[None]:
        """On the driver: the other ranks call the trainer's `name` with these arguments meanwhile.

        `name` may be dotted. Within one such call another is part of it. On the other ranks, and
        alone, nothing. Raises UserError for a rank that has ended.
        """
        if self.size == 1 or self.rank > 0:
            yield
            return
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._raise_fallen(0)
                    self.tell((name, arguments))
                yield
            except BaseException as error:
                self.broken = True
                if isinstance(error, Exception) and not isinstance(error, UserError):
                    self._raise_fallen(GRACE if isinstance(error, RuntimeError) else 0, error)
                raise
            finally:
                self._depth -= 1

    def next(self) -> tuple[str, tuple[Any, ...]] | None:
        """On the other ranks: what to call next; None at the end."""
        found: tuple[str, tuple[Any, ...]] | None = self.tell(None)
        return found

    def dismiss(self) -> None:
        """On the driver: let the other ranks end."""
        if not self.broken:
            self.tell(None)

    def _raise_fallen(self, seconds: float, cause: Exception | None = None) -> None:
        found = self.fallen(seconds)
        if found is not None:
            self.broken = True
            raise found from cause

    # -- within such a method ------------------------------------------------------------------

    def tell(self, value: Any) -> Any:
        """The driver's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._commands)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """On the driver every rank's value, in the order of ranks; elsewhere nothing."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self._commands)
        return found or []

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self._commands)
        return found

    def spread(self, value: Tensor, device: torch.device) -> Tensor:
        """The driver's tensor on every rank's device; the others give one of its shape."""
        if self.size == 1:
            return value
        mine = self.rank == 0
        here = value.to(device).contiguous() if mine else torch.empty_like(value, device=device)
        dist.broadcast(here, src=0)
        return here

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the ranks, in fp32; none counts as 0."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += 4 * parameter.numel()
            if size >= BUCKET_BYTES:
                _sum(bucket)
                bucket, size = [], 0
        if bucket:
            _sum(bucket)


def _sum(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Ranks of one machine speak over its loopback: no other machine can reach them."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
