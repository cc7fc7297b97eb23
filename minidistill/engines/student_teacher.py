"""A student's engine and a teacher's engine as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minidistill.engines.base import Engine, EngineCapabilities, Finished, Ids
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.replicas import add_counts
from minidistill.types import Advance, Completion, Request, Role, SamplingParams


class StudentTeacherEngine(Engine):
    """Each call goes to the engine of its role.

    With `equal_at_start` both roles have the same weights before the first step. The student's
    engine, which samples faster, then serves both in the baseline evaluation. `sampler` is the role
    whose completions are trained on.
    """

    name = "student and teacher"

    def __init__(
        self,
        student: Engine,
        teacher: Engine,
        *,
        equal_at_start: bool = False,
        sampler: Role = Role.STUDENT,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.sampling = teacher if sampler is Role.TEACHER else student
        self.equal_at_start = equal_at_start
        self.version = 0

    @property
    def location(self) -> str:
        return f"{self.student.location} and {self.teacher.location}"

    @property
    def description(self) -> str:
        return f"{self.student.description}; the teacher: {self.teacher.description}"

    @property
    def capabilities(self) -> EngineCapabilities:
        """The teacher's engine's, because it scores."""
        return self.teacher.capabilities

    @property
    def streams(self) -> bool:
        return self.sampling.streams

    @property
    def ends_in_order(self) -> bool:
        return self.sampling.ends_in_order

    @property
    def sleeps(self) -> bool:
        return self.student.sleeps or self.teacher.sleeps

    @property
    def score_counts(self) -> tuple[int, int]:
        return add_counts([self.student, self.teacher])

    def _engine_of(self, role: Role) -> Engine:
        equal = self.equal_at_start and self.version == 0
        engine, other = self.student, self.teacher
        if not (role is Role.STUDENT or equal):
            engine, other = other, engine
        if isinstance(engine, EmbeddedEngine):
            other.sleep()  # it may share the trainer's GPU, whose memory this call needs
        return engine

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        return self._engine_of(role).generate(requests, params, role, advance, finished)

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        return self._engine_of(role).score(prompts, completions, role, temperature)

    def score_ids(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        ids: Sequence[np.ndarray],
        role: Role,
    ) -> list[np.ndarray]:
        return self._engine_of(role).score_ids(prompts, completions, ids, role)

    def sync(self, version: int) -> None:
        self.version = version
        self.student.sync(version)
        self.teacher.sync(version)

    def sleep(self) -> None:
        self.student.sleep()
        self.teacher.sleep()

    def peak_memory(self) -> int | None:
        peaks = self.student.peak_memory(), self.teacher.peak_memory()
        return max((peak for peak in peaks if peak is not None), default=None)

    def close(self) -> None:
        self.student.close()
        self.teacher.close()
