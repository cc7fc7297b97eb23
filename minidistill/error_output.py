"""What a command prints when it fails: what is wrong, where, how to fix it, and the exit code."""

from __future__ import annotations

import sys

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_USAGE, UserError, UserErrors
from minidistill.system.files import drop_output, full_disk
from minidistill.system.symbols import encodable

_NO_HOME = "Could not determine home directory."
"""What pathlib says of `~name/…` if nobody has that name."""


def print_error(error: BaseException) -> int:
    """Print what is wrong and how to fix it, and return the exit code."""
    problem = as_user_error(error)
    for part in problem.problems:
        print_to_stderr(f"error: {part}")
    if isinstance(problem, UserErrors) and problem.hidden:
        print_to_stderr(f"(and {problem.hidden} more)")
    return problem.exit_code


def as_user_error(error: BaseException) -> UserError:
    """What is wrong, how to fix it, and the exit code of the command."""
    error = full_disk(error) or error
    package = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if package and not package.startswith("minidistill"):
        return UserError(
            f"the package {package} is missing", "", f"pip install {package}", EXIT_ENVIRONMENT
        )
    if isinstance(error, UserError):
        return error
    first_line, *_ = str(error).strip().splitlines() or [""]
    if first_line == _NO_HOME and isinstance(error, RuntimeError):
        return UserError(
            "a path begins with ~, and there is no such home directory",
            fix="write the path without ~",
            exit_code=EXIT_USAGE,
        )
    if _is_out_of_memory(error):
        return UserError(
            f"out of memory: {first_line or type(error).__name__}",
            fix="lower trainer.micro_batch_tokens or orchestrator.sampling.max_tokens, set "
            "trainer.model.ac.freq = 1, or give engines on the trainer's GPU less "
            "(inference.gpu_memory_utilization). `minidistill plan` shows what needs memory",
            exit_code=EXIT_ENVIRONMENT,
        )
    return UserError(
        f"{type(error).__name__}: {first_line}",
        fix="--traceback shows where it was raised",
        exit_code=EXIT_FAILED,
    )


def print_to_stderr(text: str) -> None:
    """Print, or drop the text if nobody reads it: the exit code is that of the error."""
    try:
        print(encodable(text, sys.stderr), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a ValueError if it is closed
        drop_output(sys.stderr)


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from minidistill.trainer.guards import is_out_of_memory

    return is_out_of_memory(error)
