"""The exception for errors that users can fix, and the exit codes of the command line."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Sequence

EXIT_OK = 0
EXIT_FAILED = 1
"""The run failed."""
EXIT_USAGE = 2
"""The command line or the configuration is wrong."""
EXIT_ENVIRONMENT = 3
"""A device or a package is missing, or there is not enough memory."""
EXIT_HEALTH = 4
"""A health check stopped the run."""
EXIT_INTERRUPTED = 130
"""Interrupted by Ctrl-C: 128 + SIGINT, as in shells."""

# Unicode marks that reorder the text after them, so that it displays as different text.
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


LONGEST = 2000
"""Characters of one part of an error, which may quote a file, a model or a server."""


def printable(text: str) -> str:
    """`text` without control characters and direction marks; newlines and tabs stay."""
    return "".join(
        char
        for char in text
        if char in "\n\t"
        or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _BIDIRECTIONAL)
    )


def bounded(text: str, limit: int = LONGEST) -> str:
    """`text`, or its beginning and how much of it is left out."""
    left_out = len(text) - limit
    return f"{text[:limit]}… ({left_out} more characters)" if left_out > 0 else text


def _part(text: str) -> str:
    """A part of an error. No line of what it quotes looks like the beginning of another one."""
    return bounded(text).replace("\n", "\n    ")


class UserError(Exception):
    """An error that the user can fix.

    `what` says what is wrong, `where` names the place (file:line and key of a configuration), and
    `fix` says how to fix it. The command line prints these three without a traceback, and exits
    with `exit_code`.
    """

    def __init__(
        self, what: str, where: str = "", fix: str = "", exit_code: int = EXIT_USAGE
    ) -> None:
        super().__init__(what, where, fix, exit_code)
        self.what, self.where, self.fix, self.exit_code = what, where, fix, exit_code

    @property
    def problems(self) -> Sequence[UserError]:
        """The errors to print: this one, or the collected ones of a `UserErrors`."""
        return (self,)

    def __str__(self) -> str:
        lines = [_part(self.what)]
        if self.where:
            lines.append(f"  where: {_part(self.where)}")
        if self.fix:
            lines.append(f"  fix: {_part(self.fix)}")
        return printable("\n".join(lines))


@contextlib.contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Name the setting `key` in errors that blame `model.name`: it names the model that failed."""
    try:
        yield
    except UserError as error:
        for problem in (error, *error.problems):
            if problem.where == "model.name":
                problem.where = key
        raise


class UserErrors(UserError):
    """Several errors reported together. The first `limit` are printed, the rest are counted."""

    SHOWN = 4

    def __init__(self, problems: Sequence[UserError], limit: int = SHOWN, hidden: int = 0) -> None:
        """`hidden` counts problems beside `problems`."""
        first = problems[0]
        super().__init__(first.what, first.where, first.fix, first.exit_code)
        self._problems = tuple(problems[:limit])
        self.hidden = hidden + len(problems) - len(self._problems)

    @property
    def problems(self) -> Sequence[UserError]:
        """The errors to print; `hidden` counts the rest."""
        return self._problems

    def __str__(self) -> str:
        text = "\n".join(str(problem) for problem in self._problems)
        return f"{text}\n(and {self.hidden} more)" if self.hidden else text
