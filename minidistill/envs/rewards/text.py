"""Rewards that look at the text of a completion: exact, contains, not_contains, regex, length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from minidistill.envs.outcomes import Attempt, Report, ScoringError
from minidistill.envs.rewards.arguments import check_bool, check_count, check_text, refusal
from minidistill.types import Reward, Task

UNITS = ("tokens", "words", "characters")


@dataclass(frozen=True, slots=True)
class Exact:
    """1 if the completion equals the answer, ignoring white space around both."""

    scores_in_process = True
    needs_answer = True

    def check(self, task: Task) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        return Reward(float(completion.strip() == task.answer.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contains:
    """1 if every text is in the completion. `text` is one or a list, by default the answer."""

    text: str | Sequence[str] | None = None
    ignore_case: bool = False
    scores_in_process = True

    def __post_init__(self) -> None:
        if isinstance(self.text, list) and self.text:
            for index, text in enumerate(self.text):
                check_text(f"text[{index}]", text)
        elif self.text is not None:
            check_text("text", self.text)
        check_bool("ignore_case", self.ignore_case)

    @property
    def needs_answer(self) -> bool:
        return self.text is None

    def check(self, task: Task) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        return Reward(float(all(self._found(task, completion))))

    def _found(self, task: Task, completion: str) -> list[bool]:
        """Whether each text is in the completion."""
        texts = task.answer if self.text is None else self.text
        texts = [texts] if isinstance(texts, str) else texts
        if self.ignore_case:
            completion, texts = completion.casefold(), [text.casefold() for text in texts]
        return [text in completion for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotContains(Contains):
    """1 if no text is in the completion."""

    def score(self, task: Task, completion: str) -> Reward:
        return Reward(float(not any(self._found(task, completion))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Regex:
    """1 if the pattern, by default the answer, matches anywhere in the completion."""

    pattern: str | None = None
    scores_in_process = False  # a match may take forever

    def __post_init__(self) -> None:
        if self.pattern is not None:
            check_text("pattern", self.pattern)
            try:
                _compile(self.pattern)
            except ValueError as error:
                raise refusal("pattern", self.pattern, "fix the pattern", str(error)) from None

    @property
    def needs_answer(self) -> bool:
        return self.pattern is None

    def check(self, task: Task) -> None:
        if self.pattern is None:
            _compile(task.answer)

    def score(self, task: Task, completion: str) -> Reward:
        pattern = task.answer if self.pattern is None else self.pattern
        return Reward(float(bool(_compile(pattern).search(completion))))


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    """The compiled pattern. Raises ValueError."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How close the completion's length is to `target`, or to the range from `min` to `max`.

    1 in the range; outside it the smaller of the length and the bound divided by the larger. The
    `unit` is "tokens" (as sampled, the end-of-sequence token included), "words" (separated by white
    space) or "characters" (without white space around the completion).
    """

    unit: str
    target: int | None = None
    min: int | None = None
    max: int | None = None
    scores_in_process = True
    needs_answer = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise refusal("unit", self.unit, f"use one of {', '.join(UNITS)}")
        for name in ("target", "min", "max"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        bounds = self.min is not None or self.max is not None
        if bounds == (self.target is not None):
            raise refusal("target", self.target, "give either target, or min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise refusal("min", self.min, f"use at most max = {self.max}")

    def check(self, task: Task) -> None: ...

    def score_all(self, attempts: Sequence[Attempt], report: Report) -> None:
        """Like `score`, for a unit that the text does not show."""
        for index, attempt in enumerate(attempts):
            length = self._text_length(attempt.completion)
            if self.unit == "tokens":
                length = attempt.tokens
            if length is None:
                report(index, ScoringError("the number of tokens is not known"))
            else:
                report(index, self._reward(length))

    def score(self, task: Task, completion: str) -> Reward:
        length = self._text_length(completion)
        if length is None:
            raise ScoringError("the number of tokens is not known")
        return self._reward(length)

    def _text_length(self, text: str) -> int | None:
        if self.unit == "tokens":
            return None
        return len(text.split()) if self.unit == "words" else len(text.strip())

    def _reward(self, length: int) -> Reward:
        low = self.target or self.min or 0
        high = self.target or self.max or length
        closeness = length / low if length < low else high / max(length, high)
        return Reward(closeness, {"length": float(length)})
