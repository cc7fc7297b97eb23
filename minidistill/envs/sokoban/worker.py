"""The process behind `WorkerProcess`: makes the levels that it is asked for, one after another."""

from __future__ import annotations

import contextlib
import sys
from multiprocessing.connection import Connection

from minidistill.envs.sokoban.levels import LevelMaker
from minidistill.errors import UserError


def serve(connection: Connection) -> None:
    """Receive a recipe, then numbers, and send their levels until the other side has gone."""
    with contextlib.suppress(EOFError, ConnectionError):
        maker = LevelMaker(connection.recv())
        while True:
            for number in connection.recv():
                try:
                    connection.send((number, maker.make(number)))
                except UserError as error:
                    connection.send(error)
                    return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
