"""vLLM's process without vLLM, which stops itself as with SIGSTOP.

The variable STOP names where: `start`, or the method that it is asked to run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection, wait


def stop_at(point: str) -> None:
    if os.environ.get("STOP") == point:
        print(f"stopping at {point}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def main(calls: int, commands: int) -> None:
    """Answer each call and command with its name. `slow` first shows some signs."""
    connections = calls_in, _ = Connection(calls), Connection(commands)
    calls_in.recv()
    stop_at("start")
    calls_in.send(("done", None))
    while True:
        for connection in wait(connections):
            method, _ = connection.recv()  # type: ignore[union-attr]
            stop_at(method)
            for _ in range(8 if method == "slow" else 0):
                time.sleep(0.1)
                calls_in.send(("report", None))
            connection.send(("done", method))  # type: ignore[union-attr]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
