"""The driver's side of a trainer with several ranks: starts, watches and ends the other ranks."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minidistill.config import Config
from minidistill.config.schema import SilenceConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.placement.placement import Placement
from minidistill.system.scratch import ScratchFolder
from minidistill.system.subprocesses import TICK, Silence, Subprocess
from minidistill.trainer.distributed.rank_group import (
    LOADED,
    STARTED,
    RankGroup,
    launched_by_torchrun,
)

MODULE = "minidistill.trainer.distributed.worker"
EXIT_SECONDS = 5.0  # that a rank has to exit before it is killed
JOIN_SECONDS = 60.0  # at least, for collectives: the first ones connect the ranks
STEP = "in a command of rank 0"


class RankLauncher:
    """Starts, watches and ends the trainer's other ranks. This process is rank 0 of `group`.

    A rank that ends, or that is silent for too long, ends the others too, so that every collective
    in progress fails.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """`devices` has one for each rank, unless torchrun started the ranks: see `start`."""
        self.devices = devices
        self.group = RankGroup(*(launched_by_torchrun() or (0, len(devices))))
        self._processes: list[RankProcess] = []
        self._folder: ScratchFolder | None = None
        self._closing = False
        self._started, self._failed = threading.Event(), threading.Event()
        self._error: Callable[[], UserError] | None = None
        self._progressed = False  # this rank, since the watch last looked

    def start(self, config: Config, placement: Placement) -> None:
        """Start the other ranks, which load the model while the caller does.

        Raises UserError for a rank that cannot be started.
        """
        if self.group.size == 1:
            return
        seconds = config.silence.step
        if launched_by_torchrun() is None:
            seconds = max(2 * seconds, JOIN_SECONDS)  # the watch is to be first
            self._folder = ScratchFolder()
            store = self._folder.path / "store"
            size = self.group.size
            for rank in range(1, size):
                device = self.devices[rank]
                self._processes.append(RankProcess(rank, size, device, store, seconds))
            self.group.failed_rank_error = self._failed_rank_error
            self.group.progress = self._note_progress
            threading.Thread(target=self._watch, args=(config.silence,), daemon=True).start()
            self._started.wait()
            self._raise_error()
        else:
            store = None
            self.group.failed_rank_error = _torchrun_error
        with self.group.explained():
            self.group.join(self.devices[0], store, seconds)
        self.group.broadcast_object((config, placement))

    def close(self) -> None:
        """End the other ranks: at once after an error, otherwise when they have finished."""
        self._closing = True
        try:
            with contextlib.suppress(Exception):
                self.group.dismiss()
        except BaseException:  # Ctrl-C
            self.group.broken = True
            raise
        finally:
            for process in self._processes:
                process.close(0 if self.group.broken else EXIT_SECONDS)
            self._processes = []
            self.group.leave()
            if self._folder is not None:
                self._folder.close()

    def _note_progress(self) -> None:
        self._progressed = True

    def _watch(self, limits: SilenceConfig) -> None:
        with contextlib.suppress(ValueError, OSError):  # `close` has closed a link
            self._watch_until_one_fails(limits)

    def _watch_until_one_fails(self, limits: SilenceConfig) -> None:
        """Read the signs of the other ranks. Those of this one are `_note_progress`."""
        by_link = {process.link: process for process in self._processes}
        loading = {p: Silence(p.name, limits.load, "silence.load") for p in self._processes}
        step = Silence("", limits.step, "silence.step")
        started: set[RankProcess] = set()
        order = itertools.count(1)
        tick = min(TICK, limits.load / 4, limits.step / 4)
        while not self._closing:
            # what has arrived counts before the silence: this process may have been suspended
            readable, _, _ = select.select(list(by_link), [], [], tick)
            for link in readable:
                process = by_link[link]
                signs = _received(link)
                if not signs:
                    self._fail(process, process.error)
                    return
                process.last_sign = next(order)
                process.trim_output()
                if STARTED in signs:
                    started.add(process)
                    if len(started) == len(by_link):
                        self._started.set()
                if LOADED in signs:
                    loading.pop(process, None)
            if readable or self._progressed or not self.group.in_command:
                self._progressed = False
                step.broken()
            if readable:
                continue
            for process, silence in loading.items():
                doing = "loading the model" if process in started else "starting"
                if silence.lasts(tick, doing):
                    self._give_up(process, silence, doing)
                    return
            if self.group.in_command and not loading:
                # whoever showed a sign after the others waits for them
                process = min(self._processes, key=lambda p: p.last_sign)
                step.who = process.name
                if step.lasts(tick, STEP):
                    self._give_up(process, step, STEP)
                    return

    def _give_up(self, process: RankProcess, silence: Silence, doing: str) -> None:
        stopped = ", stopped by a signal" if process.is_stopped() else ""
        error = silence.error(doing, stopped + process.last_words())
        process.kill()
        self._fail(process, lambda: error)

    def _fail(self, failed: RankProcess, error: Callable[[], UserError]) -> None:
        """End the other ranks, so that every collective in progress fails."""
        if self._closing:
            return
        self._error = error
        self._failed.set()
        self._started.set()
        for process in self._processes:
            if process is not failed:
                process.kill()
        if self.devices[0].type == "cuda":
            self.group.abort()

    def _failed_rank_error(self, seconds: float) -> UserError | None:
        if not self._failed.wait(seconds):
            return None
        assert self._error is not None
        return self._error()

    def _raise_error(self) -> None:
        if (error := self._failed_rank_error(0)) is not None:
            raise error


def _received(link: socket.socket) -> bytes:
    """What a rank has sent; empty if it has ended."""
    try:
        return link.recv(4096)
    except ConnectionError:
        return b""


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
    """A rank's process, and a socket for its signs, which is closed when it has ended."""

    def __init__(
        self, rank: int, size: int, device: torch.device, store: Path, seconds: float
    ) -> None:
        """Its collectives fail after so many `seconds`."""
        self.rank, self.name = rank, f"rank {rank} of the trainer"
        self.last_sign = 0
        """A number for the order of the ranks' last signs."""
        self.link, remote_end = socket.socketpair()
        descriptor = remote_end.fileno()
        with remote_end:
            arguments = map(str, (rank, size, device, store, seconds, descriptor))
            super().__init__(MODULE, [*arguments], [descriptor])

    def error(self) -> UserError:
        """The error to raise now that it has ended."""
        code, report = self.exit_report()
        memory = code == EXIT_ENVIRONMENT
        advice = (
            "lower trainer.micro_batch_tokens or set trainer.model.ac.freq = 1; " if memory else ""
        )
        return UserError(
            f"{self.name} ended: {report}",
            where="training",
            fix=f"{advice}--resume continues from the last checkpoint",
            exit_code=EXIT_ENVIRONMENT if memory else EXIT_FAILED,
        )

    def close(self, patience: float = 0.0) -> None:
        super().close(patience)
        self.link.close()
