"""Which of the sampled texts become prompts: whole, plain ones that differ from each other."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence

SHORTEST = 8
"""Characters of a prompt."""
GRAM = 5
"""Characters of the pieces by which texts are compared, whatever their language."""
NEAR = 0.7
"""Share of the pieces of two texts that both have, from which on they are near repeats."""
ECHO = 6
"""Words in a row that a text and the context must not share."""
_PUNCTUATION = re.compile(r"[^\w\s]")


class Choice:
    """Takes sampled texts one by one and keeps those that can be used.

    `kept` has them in their order, `dropped` counts the others by the reason.
    """

    def __init__(self, template_lines: Collection[str] = (), context: str = "") -> None:
        """`template_lines` are what the chat template writes around a user's message, line by line.

        With `context`, texts that repeat a part of it are left out: the model has read it, and the
        student must not.
        """
        self.kept: list[str] = []
        self.dropped: Counter[str] = Counter()
        lines = {line.strip().casefold() for line in template_lines}
        self._lines = lines - {""}
        # a role's name alone may well be in a question
        self._marks = [x for x in lines if len(x) > 3 and (_PUNCTUATION.search(x) or " " in x)]
        self._echoes = _word_grams(context)
        self._normal: set[str] = set()
        self._by_gram: dict[str, list[int]] = {}
        self._sizes: list[int] = []

    def take(self, text: str, *, ended: bool, control_tokens: Collection[str] = ()) -> bool:
        """Keep a text or count why not. Returns whether it is kept."""
        text = text.strip()
        reason = self._reason(text, ended, control_tokens)
        if reason is not None:
            self.dropped[reason] += 1
            return False
        grams, normal = _grams(text), _normalised(text)
        if self._is_repeat(normal, grams):
            self.dropped["repeats of others"] += 1
            return False
        self._normal.add(normal)
        for gram in grams:
            self._by_gram.setdefault(gram, []).append(len(self.kept))
        self._sizes.append(len(grams))
        self.kept.append(text)
        return True

    def _reason(self, text: str, ended: bool, control_tokens: Collection[str]) -> str | None:
        """Why a text cannot be used, regardless of the others; None if it can."""
        if not ended:
            return "longer than max_tokens"
        if control_tokens:
            return "with control tokens"
        if len(_normalised(text)) < SHORTEST:
            return "too short"
        if any(_is_odd(char) for char in text):
            return "with characters that are not text"
        folded = text.casefold()
        own_line = any(line.strip() in self._lines for line in folded.split("\n"))
        if own_line or any(mark in folded for mark in self._marks):
            return "repeats of the chat template"
        if self._echoes and not self._echoes.isdisjoint(_word_grams(text)):
            return "repeats of the context"
        return None

    def _is_repeat(self, normal: str, grams: Collection[str]) -> bool:
        if normal in self._normal:
            return True
        shared: Counter[int] = Counter()
        for gram in grams:
            shared.update(self._by_gram.get(gram, ()))
        return any(
            count >= NEAR * (len(grams) + self._sizes[index] - count)
            for index, count in shared.items()
        )

    def summary(self) -> str:
        """The numbers of texts that were left out, by the reason."""
        return ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())


def _normalised(text: str) -> str:
    """Letters and digits alone, with single spaces, whatever their case and form."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain))


def _grams(text: str) -> set[str]:
    normal = _normalised(text)
    return {normal[i : i + GRAM] for i in range(max(1, len(normal) - GRAM + 1))}


def _word_grams(text: str) -> set[Sequence[str]]:
    words = _normalised(text).split()
    return {tuple(words[i : i + ECHO]) for i in range(len(words) - ECHO + 1)}


def _is_odd(char: str) -> bool:
    """Whether a character is no text: a control character, or what stands for a broken one."""
    return char == "\ufffd" or (char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs"))
