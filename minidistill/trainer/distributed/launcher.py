"""The driver's side of a trainer of several ranks: it starts them, watches them, ends them."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.placement.teacher import Teaching
from minidistill.subprocesses import Child
from minidistill.trainer.distributed.rank_group import World, launched

MODULE = "minidistill.trainer.distributed.worker"
FAREWELL = 5.0  # seconds that a rank gets to end by itself


class Ranks:
    """The trainer's ranks, of which this process is the first; alone, `world` is all there is.

    Should this process die without closing, a rank sees its end of a socket close and ends its
    group itself.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """`devices` has one for each rank, where torchrun has not started them: see `start`."""
        found = launched()
        self.devices = devices
        self.world = World(*(found or (0, len(devices))))
        self._children: list[_Rank] = []
        self._folder: Path | None = None
        self._ended, self._closing = threading.Event(), False
        self._first: _Rank | None = None  # of those that ended

    def start(self, config: Config, teaching: Teaching) -> None:
        """Start the other ranks, which load the model while the caller does.

        Raises UserError where one of them cannot be started.
        """
        if self.world.size == 1:
            return
        store = None
        if launched() is None:
            self._folder = Path(tempfile.mkdtemp(prefix="minidistill-"))
            store = self._folder / "store"
            for rank in range(1, self.world.size):
                child = _Rank(rank, self.world.size, self.devices[rank], store)
                self._children.append(child)
            for child in self._children:
                if not child.link.recv(1):
                    raise child.fallen()
            self.world.fallen = self._fallen
            threading.Thread(target=self._watch, daemon=True).start()
        else:
            self.world.fallen = _someone_fell
        self.world.join(self.devices[0], store)
        self.world.tell((config, teaching))

    def close(self) -> None:
        """End the other ranks: at once after an error, else as they end themselves."""
        self._closing = True
        with contextlib.suppress(Exception):
            self.world.dismiss()
        for child in self._children:
            child.close(0 if self.world.broken else FAREWELL)
        self._children = []
        self.world.leave()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        """Once a rank has ended, end the others: what waits for any of them then fails."""
        links = {child.link: child for child in self._children}
        ready, _, _ = select.select(list(links), [], [])
        if self._closing:
            return
        self._first = links[ready[0]]
        self._ended.set()
        for child in links.values():
            if child is not self._first:
                child.kill()
        if self.devices[0].type == "cuda":
            self.world.abort()

    def _fallen(self, seconds: float) -> UserError | None:
        if not self._ended.wait(seconds):
            return None
        assert self._first is not None
        return self._first.fallen()


def _someone_fell(seconds: float) -> UserError | None:
    """torchrun watches the ranks: it says which one ended, and ends the others."""
    if seconds == 0:
        return None
    return UserError(
        "another rank of the trainer ended, or cannot be reached",
        where="torchrun",
        fix="torchrun says which and why; --resume goes on from the last checkpoint",
        exit_code=EXIT_FAILED,
    )


class _Rank(Child):
    """A rank's process and the socket that tells each of the other's end."""

    def __init__(self, rank: int, size: int, device: torch.device, store: Path) -> None:
        self.rank = rank
        self.link, theirs = socket.socketpair()
        number = theirs.fileno()
        with theirs:
            arguments = map(str, (rank, size, device, store, number))
            super().__init__(MODULE, [*arguments], [number])

    def fallen(self) -> UserError:
        """What to raise now that it has ended."""
        code, how = self.obituary()
        memory = code == EXIT_ENVIRONMENT
        advice = "lower trainer.micro_batch_tokens; " if memory else ""
        return UserError(
            f"rank {self.rank} of the trainer ended: {how}",
            where="training",
            fix=f"{advice}--resume goes on from the last checkpoint",
            exit_code=EXIT_ENVIRONMENT if memory else EXIT_FAILED,
        )

    def close(self, patience: float = 0.0) -> None:
        super().close(patience)
        self.link.close()
