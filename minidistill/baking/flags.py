"""Errors of a run that was started by `bake` name its flags, beside the keys of a configuration."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from minidistill.errors import UserError

_FLAGS = {
    "model.name": "--model",
    "orchestrator.teacher_model.context": "--context",
    "orchestrator.env.0.args.path": "--prompts",
    "orchestrator.env.0": "--prompts",
    "max_steps": "--steps",
    "output_dir": "--out",
}
_KEY = re.compile(rf"(?<![\w.-])(--)?({'|'.join(map(re.escape, _FLAGS))})(?![\w.-]*\w)")


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Name the flag of a setting in errors that are raised within."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            problem.where = in_flags(problem.where)
            problem.fix = in_flags(problem.fix)
        raise


def in_flags(text: str) -> str:
    """`text` with the flag of `bake` for a setting that has one: `--model (model.name)`.

    >>> in_flags("choose another --output_dir")
    'choose another --out'
    """

    def flag(match: re.Match[str]) -> str:
        name = _FLAGS[match[2]]
        return name if match[1] else f"{name} ({match[2]})"

    return _KEY.sub(flag, text)
