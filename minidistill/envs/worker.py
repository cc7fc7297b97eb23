"""The process that scores the completions of an environment, started by `ScoringProcess`."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from minidistill.envs.outcomes import (
    Outcome,
    ScoringError,
    describe,
    score_attempts,
    score_one,
)
from minidistill.envs.registry import load_environment
from minidistill.types import Reward

LONGEST_ERROR = 1000  # characters


def main(connection: Connection) -> None:
    """Load the environment that the driver names, then score its completions until it hangs up."""
    environment, id, args = connection.recv()
    os.environ.clear()  # of what was set for this process, and not for programs that it starts
    os.environ.update(environment)
    try:
        scorer = load_environment(id, args)
    except BaseException as error:
        connection.send(("error", describe(error)[:LONGEST_ERROR]))
        return
    connection.send(("ready", getattr(scorer, "score_all", None) is not None))
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a task that cannot be unpickled here
            connection.send(("error", describe(error)[:LONGEST_ERROR]))
        else:
            answer = _score_all if isinstance(message, list) else _score
            connection.send(answer(connection, scorer, message))


def _score(connection: Connection, scorer: Any, message: Any) -> tuple[str, Any]:
    """The answer to a task and a completion."""
    try:
        outcome = score_one(scorer, *message)
    except BaseException as error:  # KeyboardInterrupt: nobody sends this process a Ctrl-C
        outcome = ScoringError(describe(error))
    if isinstance(outcome, Reward):
        return "reward", outcome
    return "error", str(outcome)[:LONGEST_ERROR]


def _score_all(connection: Connection, scorer: Any, attempts: Any) -> tuple[str, Any]:
    """Send the outcome of each attempt as it is known. Returns the last answer."""
    lock = threading.Lock()  # a reward may report from threads of its own

    def report(index: int, outcome: Outcome) -> None:
        if isinstance(outcome, ScoringError):
            outcome = ScoringError(str(outcome)[:LONGEST_ERROR], outcome.slow)
        with lock:
            connection.send(("outcome", (int(index), outcome)))

    try:
        score_attempts(scorer, attempts, report)
    except BaseException as error:
        return "error", describe(error)[:LONGEST_ERROR]
    return "done", None


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
    os._exit(0)  # without waiting for threads that the environment started
