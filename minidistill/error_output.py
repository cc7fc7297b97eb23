"""What a command prints when it fails: what is wrong, where, how to fix it, and the exit code."""

from __future__ import annotations

import sys

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError, UserErrors
from minidistill.system.files import drop_output, full_disk


def print_error(error: BaseException) -> int:
    """Print what is wrong and how to fix it, and return the exit code."""
    known = as_user_error(error)
    if known is None:
        known = UserError(
            f"{type(error).__name__}: {_first_line(error)}",
            fix="--traceback shows where it was raised",
            exit_code=EXIT_FAILED,
        )
    for problem in known.problems:
        print_to_stderr(f"error: {problem}")
    if isinstance(known, UserErrors) and known.hidden:
        print_to_stderr(f"(and {known.hidden} more)")
    return known.exit_code


def as_user_error(error: BaseException) -> UserError | None:
    """What the user can do about an error, if its type says that; else None."""
    if isinstance(error, UserError):
        return error
    if (full := full_disk(error)) is not None:
        return full
    package = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if package and not package.startswith("minidistill"):
        return UserError(
            f"the package {package} is missing", "", f"pip install {package}", EXIT_ENVIRONMENT
        )
    if not _is_out_of_memory(error):
        return None
    return UserError(
        f"out of memory: {_first_line(error) or type(error).__name__}",
        fix="lower trainer.micro_batch_tokens or orchestrator.sampling.max_tokens, set "
        "trainer.model.ac.freq = 1, or give engines on the trainer's GPU less "
        "(inference.gpu_memory_utilization). `minidistill plan` shows what needs memory",
        exit_code=EXIT_ENVIRONMENT,
    )


def _first_line(error: BaseException) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return first


def print_to_stderr(text: str) -> None:
    """Print, or drop the text if nobody reads it: the exit code is that of the error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a ValueError if it is closed
        drop_output(sys.stderr)


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from minidistill.trainer.guards import is_out_of_memory

    return is_out_of_memory(error)
