"""The progress of a call that an engine may have to repeat in part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from minidistill.types import Advance


class Progress:
    """Counts finished completions. A batch that is repeated after OOM is counted once."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._repeated = advance, 0
        self._attempt = 0

    def __call__(self, count: int) -> None:
        self._attempt += count
        before = min(self._repeated, count)
        self._repeated -= before
        self._advance(count - before)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Decoding a batch. After an error its completions are expected again."""
        self._attempt = 0
        try:
            yield
        except BaseException:
            self._repeated += self._attempt
            raise
