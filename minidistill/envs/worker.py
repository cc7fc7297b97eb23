"""The process that scores the completions of an environment, started by `ScoringProcess`."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from minidistill.envs.outcomes import ScoringError, describe, score_one
from minidistill.envs.registry import load_environment
from minidistill.subprocesses import die_with_parent
from minidistill.types import Reward

LONGEST_ERROR = 1000  # characters


def main(connection: Connection, lifeline: int) -> None:
    """Load the environment that the driver names, then score its completions until it hangs up."""
    die_with_parent(lifeline)
    environment, id, args = connection.recv()
    os.environ.clear()  # of what was set for this process, and not for programs that it starts
    os.environ.update(environment)
    try:
        scorer = load_environment(id, args)
    except BaseException as error:
        connection.send(("error", describe(error)[:LONGEST_ERROR]))
        return
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a task that cannot be unpickled here
            connection.send(("error", describe(error)[:LONGEST_ERROR]))
        else:
            connection.send(_answer(scorer, *message))


def _answer(scorer: Any, *message: Any) -> tuple[str, str | Reward]:
    try:
        outcome = score_one(scorer, *message)
    except BaseException as error:  # KeyboardInterrupt: nobody sends this process a Ctrl-C
        outcome = ScoringError(describe(error))
    if isinstance(outcome, Reward):
        return "reward", outcome
    return "error", str(outcome)[:LONGEST_ERROR]


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
    os._exit(0)  # without waiting for threads that the environment started
