"""The driver's side of a trainer with several ranks: starts, watches and ends the other ranks."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.placement.placement import Placement
from minidistill.scratch import ScratchFolder
from minidistill.subprocesses import Subprocess
from minidistill.trainer.distributed.rank_group import RankGroup, launched_by_torchrun

MODULE = "minidistill.trainer.distributed.worker"
EXIT_SECONDS = 5.0  # that a rank has to exit before it is killed


class RankLauncher:
    """Starts and ends the trainer's other ranks. This process is rank 0 of `group`.

    If this process dies without `close`, the other ranks see their sockets close and kill their
    own process groups.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """`devices` has one for each rank, unless torchrun started the ranks: see `start`."""
        self.devices = devices
        self.group = RankGroup(*(launched_by_torchrun() or (0, len(devices))))
        self._processes: list[RankProcess] = []
        self._folder: ScratchFolder | None = None
        self._closing = False
        self._rank_ended = threading.Event()
        self._first_to_end: RankProcess | None = None

    def start(self, config: Config, placement: Placement) -> None:
        """Start the other ranks, which load the model while the caller does.

        Raises UserError for a rank that cannot be started.
        """
        if self.group.size == 1:
            return
        store = None
        if launched_by_torchrun() is None:
            self._folder = ScratchFolder()
            store = self._folder.path / "store"
            self._start_processes(store)
            self.group.failed_rank_error = self._failed_rank_error
            threading.Thread(target=self._watch, daemon=True).start()
        else:
            self.group.failed_rank_error = _torchrun_error
        self.group.join(self.devices[0], store)
        self.group.broadcast_object((config, placement))

    def close(self) -> None:
        """End the other ranks: at once after an error, otherwise when they have finished."""
        self._closing = True
        with contextlib.suppress(Exception):
            self.group.dismiss()
        for process in self._processes:
            process.close(0 if self.group.broken else EXIT_SECONDS)
        self._processes = []
        self.group.leave()
        if self._folder is not None:
            self._folder.close()

    def _start_processes(self, store: Path) -> None:
        size = self.group.size
        for rank in range(1, size):
            self._processes.append(RankProcess(rank, size, self.devices[rank], store))
        for process in self._processes:
            if not process.link.recv(1):
                raise process.error()

    def _watch(self) -> None:
        """When a rank ends, end the others, so that every collective in progress fails."""
        by_link = {process.link: process for process in self._processes}
        readable, _, _ = select.select(list(by_link), [], [])
        if self._closing:
            return
        self._first_to_end = by_link[readable[0]]
        self._rank_ended.set()
        for process in by_link.values():
            if process is not self._first_to_end:
                process.kill()
        if self.devices[0].type == "cuda":
            self.group.abort()

    def _failed_rank_error(self, seconds: float) -> UserError | None:
        if not self._rank_ended.wait(seconds):
            return None
        assert self._first_to_end is not None
        return self._first_to_end.error()


def _torchrun_error(seconds: float) -> UserError | None:
    """torchrun watches the ranks: it reports which one ended, and ends the others."""
    if seconds == 0:
        return None
    return UserError(
        "another rank of the trainer ended, or cannot be reached",
        where="torchrun",
        fix="torchrun says which and why; --resume continues from the last checkpoint",
        exit_code=EXIT_FAILED,
    )


class RankProcess(Subprocess):
    """A rank's process, and a socket that tells each side when the other has ended."""

    def __init__(self, rank: int, size: int, device: torch.device, store: Path) -> None:
        self.rank = rank
        self.link, remote_end = socket.socketpair()
        descriptor = remote_end.fileno()
        with remote_end:
            arguments = map(str, (rank, size, device, store, descriptor))
            super().__init__(MODULE, [*arguments], [descriptor])

    def error(self) -> UserError:
        """The error to raise now that it has ended."""
        code, report = self.exit_report()
        memory = code == EXIT_ENVIRONMENT
        advice = (
            "lower trainer.micro_batch_tokens or set trainer.model.ac.freq = 1; " if memory else ""
        )
        return UserError(
            f"rank {self.rank} of the trainer ended: {report}",
            where="training",
            fix=f"{advice}--resume continues from the last checkpoint",
            exit_code=EXIT_ENVIRONMENT if memory else EXIT_FAILED,
        )

    def close(self, patience: float = 0.0) -> None:
        super().close(patience)
        self.link.close()
