"""The checks of monitors' packages, which are optional."""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
from collections.abc import Callable

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.foreign import describe, foreign_code

logger = logging.getLogger(__name__)
CHECK_SECONDS = 30.0
"""How long a package may take to be imported and to say whether it can be used."""


def require(table: str, *packages: str) -> None:
    """Raise UserError (exit code 3) unless the packages of a table of monitors are installed.

    Python takes any folder of that name for a package, and runs of wandb leave one of its name.
    Such a folder has no origin.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(
                f"the configuration has a [{table}] table, but the package {package} is not "
                "installed",
                where=table,
                fix=f"pip install 'minidistill[{table}]', or run with --no-{table}",
                exit_code=EXIT_ENVIRONMENT,
            )


def answer_in_time(table: str, question: Callable[[], bool], fix: str) -> bool:
    """What a package answers. True, with a warning, if it does not within `CHECK_SECONDS`.

    Raises UserError (exit code 3) with `fix` if it fails.
    """
    answer: queue.SimpleQueue[bool | UserError] = queue.SimpleQueue()

    def broken(error: BaseException) -> UserError:
        return UserError(
            f"the configuration has a [{table}] table, but {table} cannot be used: "
            f"{describe(error)}",
            where=table,
            fix=f"correct that, {fix}",
            exit_code=EXIT_ENVIRONMENT,
        )

    def ask() -> None:
        try:
            with foreign_code(broken):
                answer.put(question())
        except UserError as error:
            answer.put(error)

    # in a thread, because code that hangs there would keep the run from starting
    threading.Thread(target=ask, name=f"check of {table}", daemon=True).start()
    try:
        found = answer.get(timeout=CHECK_SECONDS)
    except queue.Empty:
        logger.warning(
            f"{table} did not say within {CHECK_SECONDS:g} s whether it can be used: the run "
            "starts without waiting for it"
        )
        return True
    if isinstance(found, UserError):
        raise found
    return found
