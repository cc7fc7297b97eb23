"""The trainer's processes as one group: which rank this one is, and its collectives.

Rank 0 is the driver. For work that needs every rank it sends a command (`run_on_all_ranks`), which
the other ranks wait for (`next_command`) and run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer.guards import first_line, is_out_of_memory

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = timedelta(days=30)  # ranks wait while the driver samples and evaluates
JOIN_TIMEOUT = timedelta(minutes=5)
# torchrun's other ranks wait while the driver checks the configuration and loads environments
DRIVER_TIMEOUT = timedelta(minutes=30)
SILENT_SECONDS = 10.0  # of waiting for torchrun's ranks, before it is said
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets
BUCKET_BYTES = 256 << 20  # of gradients summed in one collective
STARTED, LOADED, PROGRESS = b"s", b"l", b"p"
"""What a rank sends the driver that started it: its imports worked, its model is loaded, it has
finished a collective or a micro-batch."""
EXIT_SECONDS = 5.0  # between the loss of a rank's connection and the end of its process


class Command(Protocol):
    """A call that the driver sends to the other ranks, pickled."""

    def run(self, trainer: Any) -> object:
        """Run it with a rank's trainer."""


def launched_by_torchrun() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, if torchrun started several of them.

    Raises UserError if the environment has some of torchrun's variables but not what is needed.
    """
    values = [os.environ.get(name, "") for name in TORCHRUN]
    rank, size, address, port = values
    if size in ("", "1"):
        return None
    numbers = all(value.isdecimal() for value in (rank, size, port))
    if not (numbers and address and int(rank) < int(size)):
        raise UserError(
            "the environment asks for several training processes, but not in full: "
            + ", ".join(f"{n}={v or '(not set)'}" for n, v in zip(TORCHRUN, values, strict=True)),
            where="environment",
            fix=f"start it with torchrun, or run alone: {_ALONE}",
        )
    return int(rank), int(size)


_ALONE = f"env {' '.join(f'-u {name}' for name in TORCHRUN)} minidistill run …"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the process at once.

    torch waits in C++, where Python runs no handler of a signal.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone sets handlers
        yield
        return
    found = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    before = [(s, handler) for s, handler in found if handler not in (None, signal.SIG_IGN)]
    for signum, _ in before:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)


@contextlib.contextmanager
def _said_after(seconds: float, text: str) -> Iterator[None]:
    """Log `text` if the body takes longer than some seconds."""
    timer = threading.Timer(seconds, logger.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class RankGroup:
    """Rank `rank` of `size`. A single rank needs no process group: its collectives are local."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.failed_rank_error: Callable[[float], UserError | None] = lambda seconds: None
        """On the driver: the error to raise if a rank has ended, or ends within some seconds."""
        self.drain_warnings: Callable[[], list[str]] = list
        """On the other ranks: the warnings since the last call, for the driver to log."""
        self.progress: Callable[[], None] = lambda: None
        """Called when this rank has finished a collective or a micro-batch, for who watches it."""
        self.broken = False
        """An error left the ranks at different points, so no further command can be sent."""
        self.in_command = False
        """On the driver: whether the other ranks run a command, so that they must show progress."""
        self._lock, self._depth, self._threads = threading.RLock(), 0, 0
        self._object_group: Any = None
        self._result_group: Any = None

    def join(self, device: torch.device, store: Path | None, seconds: float) -> None:
        """Join the other ranks: through a file on one machine, or as torchrun configured it.

        On a GPU tensors go over nccl; objects always go over gloo. A collective of a step fails
        after `seconds`.
        """
        limit = timedelta(seconds=seconds)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        with contextlib.ExitStack() as stack:
            if store is not None:
                stack.enter_context(_over_loopback())
                meeting: Any = dist.FileStore(str(store), self.size)
                meeting.set_timeout(JOIN_TIMEOUT)
            else:
                meeting = stack.enter_context(self._torchrun_store(limit))
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend,
                rank=self.rank,
                world_size=self.size,
                timeout=limit,
                store=meeting,
            )
            self._object_group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
            self._result_group = dist.new_group(backend="gloo", timeout=limit)
        if device.type == "cpu" and store is not None:  # the ranks share the machine's cores
            self._threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads // self.size))

    @contextlib.contextmanager
    def _torchrun_store(self, step: timedelta) -> Iterator[Any]:
        """The store over which torchrun's ranks find each other, while they do.

        Raises UserError (exit code 3) if the others do not come, or cannot be reached.
        """
        address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        others = "rank 0" if self.rank else "the other ranks"
        limit = DRIVER_TIMEOUT if self.rank else JOIN_TIMEOUT
        waiting = f"rank {self.rank} of {self.size} waits for {others} at {address}"
        alone = f"to run alone instead: {_ALONE}"
        source = f"{', '.join(TORCHRUN)} in the environment ask for it"
        minutes = f"for up to {limit.total_seconds() / 60:g} minutes"
        said = _said_after(SILENT_SECONDS, f"{waiting}, {minutes}. {source}; {alone}")
        with said, _ended_by_signals():
            store: Any = None
            try:
                found = rendezvous("env://", self.rank, self.size, timeout=limit)
                store, _, _ = next(iter(found))
                yield dist.PrefixStore("minidistill", store)  # torchrun's agent uses it too
                store.set_timeout(step)
            except (dist.DistError, RuntimeError, OSError) as error:
                if is_out_of_memory(error):
                    raise
                # without a store of the agent's the ranks meet in `rendezvous`, else at their keys
                if store is None or isinstance(error, dist.DistStoreError):
                    what, fix = f"{waiting}, but they did not meet", "start all ranks with torchrun"
                else:
                    what = f"rank {self.rank} of {self.size} cannot form a group with {others}"
                    fix = "correct the network's settings (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
                raise UserError(
                    f"{what}: {first_line(error)}",
                    where="environment",
                    fix=f"{fix}; {alone}",
                    exit_code=EXIT_ENVIRONMENT,
                ) from error

    def leave(self) -> None:
        """Leave the group without waiting for ranks that have ended."""
        if self._object_group is None:
            return
        if self.broken and torch.cuda.is_available():
            self.abort()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        self._object_group = self._result_group = None
        if self._threads:
            torch.set_num_threads(self._threads)

    def abort(self) -> None:
        """Fail the collectives that wait for a lost rank: unlike gloo, nccl does not notice."""
        with contextlib.suppress(Exception):
            dist.distributed_c10d._abort_process_group()

    # -- commands ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run_on_all_ranks(self, command: Command) -> Iterator[None]:
        """On the driver: the other ranks run `command` while the driver runs the body.

        A nested command is part of the outer one and is not sent. On the other ranks, and with a
        single rank, only the body runs. Raises UserError if a rank has ended.
        """
        if self.size == 1 or self.rank > 0:
            yield
            return
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._raise_failed_rank_error(0)
                    self.progress()
                    self.in_command = True
                    self.broadcast_object(command)
                yield
            except BaseException as error:
                self.broken = True
                self._raise_if_a_rank_failed(error)
                raise
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.in_command = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """On the driver: in the body the other ranks wait for it, and show no progress."""
        before, self.in_command = self.in_command, False
        try:
            yield
        finally:
            self.progress()
            self.in_command = before

    def next_command(self) -> Command | None:
        """On the other ranks: the driver's next command; None at the end."""
        command: Command | None = self.broadcast_object(None)
        return command

    def dismiss(self) -> None:
        """On the driver: let the other ranks end."""
        if not self.broken:
            self.broadcast_object(None)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """In a collective outside of a command: raise the UserError of a rank that has ended."""
        try:
            yield
        except Exception as error:
            if self._depth == 0:
                self._raise_if_a_rank_failed(error)
            raise

    def _raise_if_a_rank_failed(self, error: BaseException) -> None:
        """Raise the error of a rank that has ended, if that explains this one."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            seconds = EXIT_SECONDS if isinstance(error, RuntimeError) else 0
            self._raise_failed_rank_error(seconds, error)

    def _raise_failed_rank_error(self, seconds: float, cause: Exception | None = None) -> None:
        error = self.failed_rank_error(seconds)
        if error is not None:
            self.broken = True
            raise error from cause

    # -- collectives, called by every rank -----------------------------------------------------

    def broadcast_object(self, value: Any) -> Any:
        """The driver's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.explained():
            dist.broadcast_object_list(box, src=0, group=self._object_group)
        self.progress()
        return box[0]

    def gather_object(self, value: Any) -> list[Any]:
        """On the driver every rank's value, in rank order; an empty list on the other ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._result_group)
        self.progress()
        return values or []

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._result_group)
            self.progress()
        return values

    def broadcast(self, value: Tensor, device: torch.device) -> Tensor:
        """The driver's tensor on every rank's device; other ranks pass one of its shape."""
        if self.size == 1:
            return value
        if self.rank == 0:
            tensor = value.to(device).contiguous()
        else:
            tensor = torch.empty_like(value, device=device)
        dist.broadcast(tensor, src=0)
        self.progress()
        return tensor

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the ranks, in fp32. A missing one counts as 0."""
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
                _all_reduce(bucket)
                self.progress()
                bucket, size = [], 0
        if bucket:
            _all_reduce(bucket)


def _all_reduce(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def _over_loopback() -> Iterator[None]:
    """Let gloo listen on the loopback interface only, so that no other machine can connect."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
