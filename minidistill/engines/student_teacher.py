"""Student and teacher in engines of their own, as one engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minidistill.engines.base import Advance, Engine, Request
from minidistill.types import Completion


class EnginePair:
    """Each request goes to the engine of its role.

    `equal_at_start`: before the first step the student's weights are the teacher's, so that the
    student's engine, made for sampling, serves both in the baseline.
    """

    def __init__(self, student: Engine, teacher: Engine, *, equal_at_start: bool = False) -> None:
        self.student, self.teacher = student, teacher
        self.equal_at_start = equal_at_start
        self.version = 0

    @property
    def description(self) -> str:
        return f"{self.student.description}; the teacher: {self.teacher.description}"

    def _of(self, student: bool) -> Engine:
        equal = self.equal_at_start and self.version == 0
        return self.student if student or equal else self.teacher

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        student: bool,
        advance: Advance | None = None,
        **more: Any,
    ) -> list[Completion]:
        """See `Engine.generate`."""
        return self._of(student).generate(
            requests,
            max_tokens=max_tokens,
            temperature=temperature,
            student=student,
            advance=advance,
            **more,
        )

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float,
        student: bool,
    ) -> list[list[float]]:
        """See `Engine.score`."""
        engine = self._of(student)
        return engine.score(prompts, completions, temperature=temperature, student=student)

    def score_ids(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        ids: Sequence[Any],
        *,
        student: bool,
    ) -> list[Any]:
        """See `VllmEngine.score_ids`."""
        engine: Any = self._of(student)
        return engine.score_ids(prompts, completions, ids, student=student)

    def sync(self, version: int) -> None:
        """Both take over what they serve of the trainer's weights."""
        self.version = version
        self.student.sync(version)
        self.teacher.sync(version)

    def sleep(self) -> None:
        self.student.sleep()
        self.teacher.sleep()

    def close(self) -> None:
        self.student.close()
        self.teacher.close()
