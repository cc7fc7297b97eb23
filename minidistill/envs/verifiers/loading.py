"""Loading an environment of verifiers, in whichever version is installed.

The package is imported when the environment is loaded: `pip install 'minidistill[verifiers]'`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from minidistill.envs.arguments import require_argument
from minidistill.envs.verifiers.classic import ClassicEnvironment
from minidistill.envs.verifiers.taskset import TasksetEnvironment, load_config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.foreign import describe
from minidistill.system.local_modules import find_in_current_directory

logger = logging.getLogger(__name__)
ID = "verifiers"
OLDEST, NEWEST = (0, 1, 14), (0, 4)
"""The versions that this was written for: from `OLDEST` to all of `NEWEST`."""
ENDPOINTS = (0, 4)
"""From here on an environment asks an endpoint for answers, and no object."""
INSTALL = "pip install 'minidistill[verifiers]'"
_require = partial(require_argument, ID, names_argument=True)


def load(
    env: str,
    env_args: dict[str, Any] | None = None,
    num_train_examples: int = 1000,
    num_eval_examples: int = 200,
    seed: int = 0,
    reward_errors: str = "fail",
) -> Any:
    """The installed environment `env`, loaded with `env_args`.

    At most so many rows are used. If it has none for evaluation, rows are held out, by a hash with
    `seed`. A reward function that raises makes its conversation fail; with `reward_errors = "zero"`
    it gives 0, as verifiers has it, and is counted in the metric `reward_errors`. Raises UserError
    if the package or the environment is missing, and for what cannot be played.
    """
    for name, count in (
        ("num_train_examples", num_train_examples),
        ("num_eval_examples", num_eval_examples),
    ):
        _require(type(count) is int and count > 0, name, count, "use a whole number above 0")
    _require(type(seed) is int, "seed", seed, "use a whole number")
    _require(isinstance(env, str) and bool(env), "env", env, "use the id of an environment")
    zero = reward_errors == "zero"
    _require(
        zero or reward_errors == "fail", "reward_errors", reward_errors, 'use "fail" or "zero"'
    )
    counts, args = (num_train_examples, num_eval_examples), dict(env_args or {})
    installed = installed_version()
    find_in_current_directory(env.replace("-", "_").split("/")[-1].partition(".")[0])
    with _handlers_restored():
        if installed >= ENDPOINTS:
            return TasksetEnvironment(_config(env, args), counts, seed)
        return ClassicEnvironment(_classic(env, args), counts, seed, zero)


def installed_version() -> tuple[int, ...]:
    """The version of verifiers. Raises UserError if it is not there, or none that is known here."""
    try:
        text = version(ID)
    except PackageNotFoundError:
        raise UserError(
            "the environment 'verifiers' needs a package that is not installed: verifiers",
            where="id",
            fix=INSTALL,
            exit_code=EXIT_ENVIRONMENT,
        ) from None
    numbers = tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())
    if numbers < OLDEST or numbers[:2] > NEWEST:
        oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
        raise UserError(
            f"verifiers {text} is installed, and its interface is another one than that of "
            f"{oldest} to {newest}",
            where="id",
            fix=INSTALL,
            exit_code=EXIT_ENVIRONMENT,
        )
    return numbers


def _config(env: str, args: dict[str, Any]) -> Any:
    """The configuration of a task set, in the package's own classes."""
    import verifiers.v1  # noqa: F401, which sets the package's logging up

    _forward_logs()
    try:
        return load_config(env, args)
    except ModuleNotFoundError as error:
        raise _not_imported(env, error) from error


def _classic(env: str, args: dict[str, Any]) -> Any:
    """The environment, by the package's own function."""
    import datasets
    import verifiers

    datasets.disable_progress_bars()
    load_environment = verifiers.load_environment  # which sets the package's logging up
    _forward_logs()
    try:
        return load_environment(env, **args)
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise _not_imported(env, error.__cause__) from error


def _not_imported(env: str, error: BaseException) -> UserError:
    return UserError(
        f"verifiers: the environment {env!r} cannot be imported: {describe(error)}",
        where="args.env",
        fix="install its package, or name a module in the current directory",
        exit_code=EXIT_ENVIRONMENT,
    )


@contextlib.contextmanager
def _handlers_restored() -> Iterator[None]:
    """Set back the handlers of SIGINT and SIGTERM, which each environment of verifiers replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # it was set by no Python code
                    signal.signal(number, handler)


class _Forward(logging.Handler):
    """Writes another package's records to the run's log alone."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.debug(f"{record.name}: {record.getMessage()}")


def _forward_logs() -> None:
    """Keep the package's records from the terminal, unless VF_LOG_LEVEL asks for them."""
    package = logging.getLogger(ID)
    if not package.handlers:
        package.addHandler(_Forward(logging.WARNING))
