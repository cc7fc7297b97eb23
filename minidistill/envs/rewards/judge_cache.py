"""The scores of a judge, in memory and in a file of the user's cache."""

from __future__ import annotations

import contextlib
import json
import math

from minidistill.system.files import cache_folder


class ScoreCache:
    """Scores by the hash of a question. The file has no text of prompts or completions.

    Runs may share the file: each appends whole lines. A file that cannot be read or written is no
    error, because the judge can be asked again.
    """

    def __init__(self, judge: str, on_disk: bool) -> None:
        """`judge` is the hash of what the judge is: its scores are in a file of their own."""
        self.path = cache_folder("judge") / f"{judge[:32]}.jsonl" if on_disk else None
        self._scores: dict[str, float] | None = None

    def get(self, question: str) -> float | None:
        if self._scores is None:
            self._scores = self._read()
        return self._scores.get(question)

    def put(self, question: str, score: float) -> None:
        if self._scores is not None:
            self._scores[question] = score
        if self.path is not None:
            line = json.dumps([question, score]) + "\n"
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab") as file:
                    file.write(line.encode())

    def _read(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        if self.path is not None:
            with contextlib.suppress(OSError):
                for line in self.path.read_bytes().splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # half a line of a killed run
                        question, score = json.loads(line)
                        if math.isfinite(score):
                            scores[question] = float(score)
        return scores
