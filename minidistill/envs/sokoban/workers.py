"""Processes that make levels."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait

from minidistill.envs.sokoban.levels import Level, LevelMaker, Recipe
from minidistill.errors import UserError
from minidistill.system.subprocesses import Subprocess
from minidistill.system.threads import usable_cores

PATIENCE = 1.0  # seconds of work that start no processes
BATCH = 8  # levels a process is asked for at a time
SILENT_SECONDS = 120.0  # without a level, after which the processes are ended
TICK = 1.0  # seconds between two looks at silent processes
NOTED = 100  # as many levels are worth a note in the terminal
MODULE = "minidistill.envs.sokoban.worker"

logger = logging.getLogger(__name__)


def make_levels(maker: LevelMaker, numbers: Sequence[int]) -> Iterator[tuple[int, Level]]:
    """The levels of these numbers, in any order, each with its number.

    What `PATIENCE` is too short for is made by a process for each core, if there are several. If a
    process dies, that is logged, and others make its levels. Raises UserError if there is no such
    level.
    """
    began = time.perf_counter()
    unmade = deque(numbers)
    while unmade:
        processes = min(usable_cores(), len(unmade) // BATCH)
        if time.perf_counter() - began > PATIENCE and processes > 1:
            yield from _make_in_processes(maker.recipe, unmade, processes)
            began = math.inf  # what is left is left by processes that died
        else:
            number = unmade.popleft()
            yield number, maker.make(number)


def _make_in_processes(
    recipe: Recipe, unmade: deque[int], processes: int
) -> Iterator[tuple[int, Level]]:
    """Take numbers from `unmade` and yield their levels, until none is left or no process lives.

    Processes that all hang are ended, so that others make their levels.
    """
    level = logging.INFO if len(unmade) >= NOTED else logging.DEBUG
    logger.log(level, f"sokoban-env: making {len(unmade)} levels in {processes} processes")
    with ExitStack() as stack:
        workers, silent = {}, 0.0
        for _ in range(processes):
            worker = WorkerProcess(recipe)
            stack.callback(worker.close)
            workers[worker.connection] = worker
        while workers and (unmade or any(worker.asked for worker in workers.values())):
            for worker in workers.values():
                if unmade and not worker.asked:
                    worker.ask([unmade.popleft() for _ in range(min(BATCH, len(unmade)))])
            ready = wait(list(workers), TICK)
            silent = 0.0 if ready else silent + TICK
            if silent >= SILENT_SECONDS:
                logger.warning(f"sokoban-env: no process made a level for {silent:g} s")
                for worker in workers.values():
                    worker.kill()
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = workers[connection]
                try:
                    yield worker.receive()
                except (EOFError, OSError):
                    report = worker.exit_report()[1]
                    logger.warning(f"sokoban-env: a process that makes levels died: {report}")
                    unmade.extend(worker.asked)
                    del workers[connection]


class WorkerProcess(Subprocess):
    """A process that makes levels of a recipe. It ends when its connection is closed."""

    def __init__(self, recipe: Recipe) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            super().__init__(MODULE, [str(theirs.fileno())], [theirs.fileno()])
        self.connection = Connection(ours.detach())
        self.asked: list[int] = []
        """Numbers whose levels have not been received."""
        self._send(recipe)

    def ask(self, numbers: list[int]) -> None:
        self.asked = numbers
        self._send(numbers)

    def receive(self) -> tuple[int, Level]:
        """The next level, with its number.

        Raises the UserError that the process reports, and EOFError or OSError if it has died.
        """
        answer: tuple[int, Level] | UserError = self.connection.recv()
        if isinstance(answer, UserError):
            raise answer
        self.asked.remove(answer[0])
        return answer

    def close(self, patience: float = 0.0) -> None:
        self.connection.close()
        super().close(patience)

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # if it has died, `receive` says so
            self.connection.send(message)
