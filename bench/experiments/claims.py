"""Claims that tables are to confirm or contradict, and what they say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from bench.experiments.runs import Record
from bench.experiments.statistics import Mean, difference, mean

CONFIRMED, CONTRADICTED, NOT_SHOWN = "confirmed", "contradicted", "not shown"
INCOMPLETE = "incomplete"
"""While runs are missing, or if one has failed."""
UNDEFINED = "undefined"
"""The runs are there, but one of them has no such figure: for example no share of a gap of zero."""
Records = Mapping[str, Sequence[Record]]
"""By the run's name."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`word` is one of the five above."""

    claim: str
    word: str
    figures: str = ""


class Claim(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def figure(self) -> str: ...

    def judge(self, records: Records, seeds: int) -> Verdict:
        """Raises Missing."""
        ...


class Missing(Exception):
    """A claim cannot be judged. The message is the word of its verdict."""


def numbers(records: Sequence[Record], figure: str) -> list[float]:
    """The figure of each record that has it."""
    return [value for record in records if (value := record.number(figure)) is not None]


def values(records: Records, run: str, figure: str, seeds: int) -> list[float]:
    """A figure of each seed. Raises Missing."""
    made = [r for r in records.get(run, ()) if r.error is None]
    if len(made) < seeds:
        raise Missing(INCOMPLETE)
    found = numbers(made, figure)
    if len(found) < seeds:
        raise Missing(UNDEFINED)
    return found


def paired(records: Records, run: str, other: str, figure: str, seeds: int) -> Mean:
    """The mean difference of two runs, seed by seed. Raises Missing."""
    ours, theirs = (values(records, name, figure, seeds) for name in (run, other))
    return difference(ours, theirs)


def judged(claim: Claim, records: Records, seeds: int) -> Verdict:
    """What the records say of a claim."""
    try:
        return claim.judge(records, seeds)
    except Missing as missing:
        return Verdict(claim.text, str(missing))


def word(measured: Mean, low: float, high: float) -> str:
    """Whether the interval lies within these bounds, outside them, or across one of them."""
    if measured.low is None or measured.high is None:
        return NOT_SHOWN
    if measured.low > low and measured.high < high:
        return CONFIRMED
    return CONTRADICTED if measured.high < low or measured.low > high else NOT_SHOWN


def interval(measured: Mean, spec: str) -> str:
    """The interval in brackets; empty if there is none."""
    if measured.low is None or measured.high is None:
        return ""
    return f" ({measured.low:{spec}} to {measured.high:{spec}})"


def difference_text(found: Mean) -> str:
    return f"difference {found.value:+.3f}{interval(found, '+.3f')}"


@dataclass(frozen=True, slots=True)
class EverySeed:
    """A figure is at least (or with `most` at most) a bound, with each seed."""

    text: str
    run: str
    figure: str
    bound: float
    most: bool = False

    def judge(self, records: Records, seeds: int) -> Verdict:
        found = values(records, self.run, self.figure, seeds)
        holds = max(found) <= self.bound if self.most else min(found) >= self.bound
        worst = max(found) if self.most else min(found)
        verdict = CONFIRMED if holds else CONTRADICTED
        which = f"worst of {seeds} seeds" if seeds > 1 else "one seed"
        return Verdict(self.text, verdict, f"{which}: {worst:.3g}")


@dataclass(frozen=True, slots=True)
class Higher:
    """A figure is higher with one run than with another: the paired difference's interval is above
    `margin`. An interval below it contradicts the claim; one that includes it shows nothing."""

    text: str
    run: str
    other: str
    figure: str = "gap_closed"
    margin: float = 0.0

    def judge(self, records: Records, seeds: int) -> Verdict:
        found = paired(records, self.run, self.other, self.figure, seeds)
        return Verdict(self.text, word(found, self.margin, inf), difference_text(found))


@dataclass(frozen=True, slots=True)
class Near:
    """A figure is within `tolerance`, as a share, of what was predicted, by its interval."""

    text: str
    run: str
    figure: str
    predicted: float
    tolerance: float

    def judge(self, records: Records, seeds: int) -> Verdict:
        measured = mean(values(records, self.run, self.figure, seeds))
        room = self.tolerance * abs(self.predicted)
        return Verdict(
            self.text,
            word(measured, self.predicted - room, self.predicted + room),
            f"{measured.value:.3g}{interval(measured, '.3g')}, predicted {self.predicted:g}",
        )


@dataclass(frozen=True, slots=True)
class Alike:
    """The means of a figure with two runs differ by at most `margin`. There may be one seed, so no
    interval is asked for."""

    text: str
    run: str
    other: str
    figure: str
    margin: float

    def judge(self, records: Records, seeds: int) -> Verdict:
        found = paired(records, self.run, self.other, self.figure, seeds)
        verdict = CONFIRMED if abs(found.value) <= self.margin else CONTRADICTED
        return Verdict(self.text, verdict, difference_text(found))
