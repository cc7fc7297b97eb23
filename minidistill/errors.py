"""The one exception meant for users, and the exit codes of the command line."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILED = 1
"""The run itself failed."""
EXIT_USAGE = 2
"""The command line or the configuration is wrong."""
EXIT_ENVIRONMENT = 3
"""A device, memory or a package is missing."""
EXIT_HEALTH = 4
"""A health check stopped the run."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it."""

# Marks that reorder what is shown after them: text could pretend to be other text.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """`text` without what could drive or deceive a terminal; newlines and tabs stay."""
    return "".join(
        char
        for char in text
        if char in "\n\t"
        or (unicodedata.category(char) not in ("Cc", "Cs") and char not in _REORDERING)
    )


class UserError(Exception):
    """Something the user can put right.

    `what` is wrong, `where` it was written (file:line and key for a configuration), how to `fix`
    it, and the code the process exits with. The command line prints the three, no traceback.
    """

    def __init__(
        self, what: str, where: str = "", fix: str = "", exit_code: int = EXIT_USAGE
    ) -> None:
        super().__init__(what, where, fix, exit_code)
        self.what, self.where, self.fix, self.exit_code = what, where, fix, exit_code

    @property
    def problems(self) -> Sequence[UserError]:
        """The problems to show one by one: this one, unless several were collected."""
        return (self,)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return printable("\n".join(lines))


class UserErrors(UserError):
    """Several problems found in one go, so that they need not be met one run at a time."""

    def __init__(self, problems: Sequence[UserError], shown: int = 4) -> None:
        first = problems[0]
        super().__init__(first.what, first.where, first.fix, first.exit_code)
        self._problems = tuple(problems[:shown])
        self.hidden = max(0, len(problems) - shown)

    @property
    def problems(self) -> Sequence[UserError]:
        """The problems shown; `hidden` counts the rest."""
        return self._problems

    def __str__(self) -> str:
        text = "\n".join(str(problem) for problem in self._problems)
        return f"{text}\n(and {self.hidden} more)" if self.hidden else text
