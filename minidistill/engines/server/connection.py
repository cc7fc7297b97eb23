"""One server: what is asked of it again, how long it is waited for, and errors that name it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import count
from typing import Any, TypeVar

from minidistill.engines.server.answers import NotFiniteError
from minidistill.engines.server.http import KEY, Client, GoneError
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.system.http import (
    FIRST_WAIT,
    LONGEST_WAIT,
    REPEATED,
    Answer,
    BadAnswerError,
    hidden,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class BusyError(Exception):
    """The server did not answer a request that it may answer later, in `wait` seconds or more."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Server:
    """A server, for two threads: one that samples, one that syncs.

    If it goes away, it is waited for, up to `patience` seconds and `max_restarts` times a run. What
    it is too busy for is repeated, until it has answered nothing for `patience` seconds.
    """

    patience = 120.0

    def __init__(
        self, client: Client, name: str, where: str, command: str, max_restarts: int
    ) -> None:
        """`where` is the setting that has the URL, and `command` starts a suitable server."""
        self.client, self.where, self.command = client, where, command
        self.description = f"{name} at {client.url}"
        self.max_restarts, self.restarts = max_restarts, 0
        self.lock = threading.RLock()  # loading adapters, waiting for the server, closing
        self.closed = threading.Event()
        self._returns = 0
        self._answered_at = 0.0  # of `time.monotonic`
        self._said_busy = False

    # -- a request -----------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, *seconds: float) -> Answer:
        """The answer to a short request. Raises GoneError, and UserError for none that is valid."""
        with self.checked_answers():
            return self.client.request(method, path, body, *seconds)

    @contextlib.contextmanager
    def checked_answers(self) -> Iterator[None]:
        """Raise UserError if the body finds that an answer does not match its request."""
        try:
            yield
        except NotFiniteError as error:
            fix = "see the server's log: its model, or the adapter that it was sent, is broken"
            raise self.refusal(f"gave a wrong answer: {error}", fix, EXIT_HEALTH) from None
        except BadAnswerError as error:
            what = hidden(f"gave a wrong answer: {error}", self.client.key)
            raise self.refusal(what, f"start a vLLM server with\n{self.command}") from None

    def accepted(self, answer: Answer) -> Answer:
        """The answer, if the request was accepted. Raises BusyError and UserError."""
        if answer.status == HTTPStatus.OK:
            return answer
        self.raise_if_busy(answer)
        if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            fix = f"put its API key into the environment variable {KEY}"
            raise self.refusal(f"refuses access: {answer.message()}", fix)
        fix = f"start the server with\n{self.command}"
        raise self.refusal(f"refuses a request: {answer.message()}", fix)

    def raise_if_busy(self, answer: Answer) -> None:
        if answer.status in REPEATED:
            raise BusyError(answer.message(), answer.wait)

    def refusal(self, what: str, fix: str, exit_code: int = EXIT_ENVIRONMENT) -> UserError:
        what = f"the {self.description} {what}"
        return UserError(what, where=self.where, fix=fix, exit_code=exit_code)

    # -- again ---------------------------------------------------------------------------------

    def answered(self) -> None:
        """It has answered: its `patience` seconds begin again."""
        self._answered_at = time.monotonic()

    def pause(self, error: BusyError, tries: int) -> float:
        """The seconds until it is asked again. Raises UserError if that would be too late."""
        pause = max(min(FIRST_WAIT * 2 ** min(tries - 1, 10), LONGEST_WAIT), error.wait)
        if time.monotonic() + pause > self._answered_at + self.patience:
            raise self.refusal(
                f"answered nothing for {self.patience:g} s ({tries} tries of a request): {error}",
                "see the server's log, or send it fewer requests: lower orchestrator.batch_size. "
                "--resume continues from the last checkpoint",
            )
        if not self._said_busy:
            self._said_busy = True
            logger.info(
                f"the {self.description} is busy ({error}): it is asked again, until it has "
                f"answered nothing for {self.patience:g} s"
            )
        return pause

    def repeating(self, call: Callable[[], T]) -> T:
        """The result of `call`, repeated while the server is busy. Raises GoneError."""
        self.answered()
        for tries in count(1):
            try:
                return call()
            except BusyError as error:
                pause = self.pause(error, tries)
            if self.closed.wait(pause):
                break
        raise self._lost("this run has ended")

    def retrying(self, call: Callable[[], T], restore: Callable[[], None]) -> T:
        """The result of `call`, retried when a server that went away is back.

        `restore` then checks it and sends it what it has forgotten.
        """
        while True:
            seen = self._returns
            try:
                return self.repeating(call)
            except GoneError as error:
                with self.lock:
                    if seen == self._returns:  # else another thread has waited for it
                        self._wait(error, restore)

    def _wait(self, error: GoneError, restore: Callable[[], None]) -> None:
        if self.closed.is_set():  # whatever the error: closing removes the adapters
            raise self._lost("this run has ended") from error
        if self.restarts >= self.max_restarts:
            times = f" (waited for it {self.restarts} times)" if self.restarts else ""
            raise self._lost(f"{error}{times}") from error
        self.restarts += 1
        logger.warning(
            f"the {self.description} is away ({error}): waiting for it, for up to "
            f"{self.patience:g} s"
        )
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            closed = self.closed.wait(pause)
            pause = min(2 * pause, 10.0)
            try:
                restore()
                self._returns += 1
                return
            except (GoneError, BusyError) as still:
                if closed or time.monotonic() >= end:
                    raise self._lost(str(still)) from still

    def _lost(self, why: str) -> UserError:
        fix = "see the server's log and restart it; --resume continues from the last checkpoint"
        return self.refusal(f"has gone away: {why}", fix)
