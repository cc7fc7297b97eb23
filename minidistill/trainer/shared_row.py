"""Sequences in one row without padding, in which each prompt is there once.

The row begins with what all prompts have in common. Each distinct prompt follows, and after it the
completions that were sampled from it. A token attends to the segments that its sequence consists
of, so the pass computes what it would compute for each sequence alone, forward and backward: the
gradients of shared keys and values add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_SHARED = 8
"""Below this many tokens, a common beginning costs more than it saves."""

Span = tuple[int, int]
"""Positions in the row, from the first up to the second."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of a row. Each attends to `before` and to the segment up to itself."""

    start: int
    stop: int
    before: tuple[Span, ...] = ()

    @property
    def span(self) -> Span:
        return self.start, self.stop

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class SharedRow:
    """A row under construction."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each token in its sequence."""
    segments: list[Segment] = field(default_factory=list)

    def add(self, ids: Sequence[int], after: tuple[Span, ...], position: int) -> Span:
        """Append a segment whose first token is at `position` in its sequence."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        segment = Segment(start, len(self.ids), after)
        if len(segment):
            self.segments.append(segment)
        return segment.span


def shared_row(
    prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]], first: int
) -> tuple[SharedRow, list[list[int]]]:
    """The row, and for each completion the columns of the states that predict its tokens.

    `first` is the position of the prompts' first token, after a cached prefix. The last token of a
    completion is left out, because nothing is predicted from it.
    """
    row = SharedRow()
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(index)
    common = common_prefix([*by_prompt]) if len(by_prompt) > 1 else ()
    common = common if len(common) >= MIN_SHARED else ()
    root = (row.add(common, (), first),) if common else ()
    columns: list[list[int]] = [[] for _ in prompts]
    for prompt, indices in by_prompt.items():
        own = row.add(prompt[len(common) :], root, first + len(common))
        for index in indices:
            completion = completions[index][:-1]
            start, stop = row.add(completion, (*root, own), first + len(prompt))
            columns[index] = [own[1] - 1, *range(start, stop)]
    return row, columns


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ids that all sequences begin with. At least one id of each sequence is left over."""
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    limit = min(map(len, sequences)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    return tuple(low[:length])
