"""Scoring in a process that can be killed: its driver's side."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from minidistill.envs.outcomes import (
    Attempt,
    CannotScoreError,
    Report,
    ScoringError,
    score_one,
)
from minidistill.envs.protocol import Environment, check_ready, has_task
from minidistill.errors import EXIT_ENVIRONMENT
from minidistill.system.foreign import describe, foreign_code
from minidistill.system.subprocesses import Subprocess, limit_transfers
from minidistill.types import Reward, Task

logger = logging.getLogger(__name__)
MODULE = "minidistill.envs.worker"
LOAD_SECONDS = 600.0  # that the process gets to load the environment


class ScoringProcess(Subprocess):
    """The subprocess and the connection to it."""

    def __init__(self, id: str, args: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        try:
            super().__init__(MODULE, [str(theirs.fileno())], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        limit_transfers(ours, LOAD_SECONDS)
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # if it has died, the first `receive` reports it
            self.connection.send((dict(os.environ), id, args))

    def receive(self, seconds: float) -> tuple[str, Any] | None:
        """What it sends within `seconds`, else None. Raises EOFError or OSError if it has died."""
        answer = self.connection.recv() if self.connection.poll(seconds) else None
        self.trim_output()
        return answer

    def close(self, patience: float = 0.0) -> None:
        super().close(patience)
        self.connection.close()


class IsolatedEnvironment:
    """An environment whose completions are scored in another process, one at a time.

    The process loads the environment again, or with `environment.scorer`, a pair of id and args,
    what that names. It is kept for the whole run. A score that takes longer than `timeout` seconds,
    or that ends the process, fails for this completion; a new process scores the next one.

    What has `score_all` scores them together there: `timeout` is then for each outcome after the
    one before, and all completions without an outcome fail.
    """

    has_rewards = True

    def __init__(
        self, environment: Environment, id: str, args: dict[str, Any], timeout: float, where: str
    ) -> None:
        self.environment, self.timeout = environment, timeout
        self.id, self.where = id, where
        self._loaded: tuple[str, dict[str, Any]] = getattr(environment, "scorer", (id, args))
        self._process: ScoringProcess | None = None
        self._ready = self._together = self._closed = False
        self._lock = threading.Lock()  # held while a completion is scored

    @property
    def has_task(self) -> bool:
        return has_task(self.environment)

    @property
    def train(self) -> Sequence[Task]:
        return self.environment.train

    @property
    def eval(self) -> Sequence[Task]:
        return self.environment.eval

    def score(self, task: Task, completion: str) -> Reward:
        """The reward. Raises ScoringError, and CannotScoreError if no process can be started."""
        message = self._pickled((task, completion))
        with self._lock:
            reward: Reward = self._answer(self._ready_process(), message)[1]
            return reward

    def score_all(self, attempts: Sequence[Attempt], report: Report) -> None:
        """Score one at a time, or together if what the process has loaded can do that."""
        with self._lock:
            self._ready_process()
        if not self._together:
            for index, attempt in enumerate(attempts):
                report(index, score_one(self, attempt.task, attempt.completion))
            return
        message = self._pickled(list(attempts))
        with self._lock:
            process = self._ready_process()
            try:
                kind, value = self._answer(process, message)
                while kind == "outcome":
                    report(*value)
                    kind, value = self._answer(process)
            except BaseException:  # of `report`: what it still sends is for nobody
                self._end_process()
                raise

    def check_ready(self) -> None:
        check_ready(self.environment)

    def start(self) -> None:
        """Start the process, which loads the environment while the caller goes on."""
        with self._lock:
            self._start()

    def check(self) -> None:
        """Wait for the process to be ready. Raises CannotScoreError if it is not able to score."""
        with self._lock:
            self._ready_process()
        for split in (self.environment.train, self.environment.eval):
            if len(split):
                self._pickled(split[0])

    def close(self) -> None:
        """End the process for good. A score in progress, in another thread, fails."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end_process()
        close_environments([self.environment])

    def _start(self) -> ScoringProcess:
        if self._closed:
            raise CannotScoreError("the run has ended", self.where)
        if self._process is None:
            self._process, self._ready = ScoringProcess(*self._loaded), False
        return self._process

    def _ready_process(self) -> ScoringProcess:
        process = self._start()
        if not self._ready:
            try:
                answer = process.receive(LOAD_SECONDS)
                kind, value = answer or ("error", f"it did not load within {LOAD_SECONDS:g} s")
            except (EOFError, OSError):
                kind, value = "error", f"its process ended: {process.exit_report()[1]}"
            if kind == "error":
                self._end_process()
                raise CannotScoreError(
                    f"the environment {self.id!r} cannot score in a process of its own: {value}",
                    where=self.where,
                    fix='score_timeout = "off" scores in the process of the run, without a limit',
                    exit_code=EXIT_ENVIRONMENT,
                )
            self._ready, self._together = True, bool(value)
        return process

    def _answer(self, process: ScoringProcess, message: bytes = b"") -> tuple[str, Any]:
        """Send a message, if there is one, and wait for an answer. Raises ScoringError."""
        try:
            if message:
                process.connection.send_bytes(message)
            answer = process.receive(self.timeout)
        except (EOFError, OSError):
            _, report = process.exit_report()
            self._end_process()
            raise ScoringError(f"it ended its process: {report}", slow=True) from None
        if answer is None:
            self._end_process()
            raise ScoringError(
                f"it took longer than score_timeout = {self.timeout:g} s, and was stopped",
                slow=True,
            )
        if answer[0] == "error":
            raise ScoringError(answer[1])
        return answer

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _pickled(self, value: object) -> bytes:
        def failure(error: BaseException) -> CannotScoreError:
            return CannotScoreError(
                f"a task of the environment {self.id!r} cannot be sent to the process that scores: "
                f"{describe(error)}",
                where=self.where,
                fix='make its tasks of plain data, or set score_timeout = "off" to score in the '
                "process of the run, without a limit",
            )

        with foreign_code(failure, ours=()):  # a task's own methods may raise anything
            return pickle.dumps(value)


def close_environments(environments: Iterable[Environment]) -> None:
    """Call `close` of those that have it. An error there is logged: the run has ended."""
    for environment in environments:
        try:
            with foreign_code(lambda error: RuntimeError(describe(error)), ours=()):
                if (close := getattr(environment, "close", None)) is not None:
                    close()
        except RuntimeError as error:
            logger.warning(f"an environment could not be closed: {error}")
