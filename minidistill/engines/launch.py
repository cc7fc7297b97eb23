"""Starting the engines that a run samples and scores with."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.replicas import Replicas
from minidistill.engines.student_teacher import StudentTeacherEngine
from minidistill.estimators import TeacherNeeds
from minidistill.placement.placement import EnginePlacement, Placement
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Role


class EngineLauncher:
    """Starts the engines' processes, which load while the trainer does, and then connects them."""

    def __init__(self, config: Config, placement: Placement, sync_folder: Path) -> None:
        """Servers read adapters from `sync_folder`."""
        self.config, self.placement, self.sync_folder = config, placement, sync_folder
        self.sampler = Role(config.orchestrator.sample_from)
        self.student: Engine | None = None
        self.teacher: Engine | None = None

    def start(self) -> Placement:
        """Start the engines of the placement. Returns the placement as started.

        It differs in one case: only a running engine can say whether it scores chosen ids. If it
        does not, the teacher runs in the trainer.

        Engines that share GPUs with the trainer sleep until it has loaded and checked its model.
        """
        try:
            placement = self._start_all()
            for engine in (self.student, self.teacher):
                if engine is not None:
                    engine.sleep()
        except BaseException:
            self.close()
            raise
        return placement

    def _start_all(self) -> Placement:
        placement = self.placement
        if not placement.student.in_trainer:
            self.student = self._start(placement.student, teacher=False)
        if self._needs_ids() and not self._scores_ids():
            return placement.with_teacher_in_trainer(self.config)
        if placement.teacher_engine is not None:
            self.teacher = self._start(placement.teacher_engine, teacher=True)
        return placement

    def _needs_ids(self) -> bool:
        teacher = self.placement.teacher
        needs = teacher.estimator.needs
        return teacher.scorer == "engine" and needs is TeacherNeeds.LOGPROBS_AT_IDS

    def _scores_ids(self) -> bool:
        return self.student is not None and self.student.capabilities.scores_ids

    def _start(self, engine: EnginePlacement, *, teacher: bool) -> Engine:
        assert engine.kind.module is not None
        module = import_module(engine.kind.module)
        replicas = module.start(engine, self.config, self.sync_folder, teacher=teacher)
        return replicas[0] if len(replicas) == 1 else Replicas(replicas)

    def sampled_by(self, policy: Policy) -> set[Role]:
        """The roles whose completions the trainer's model, `policy`, samples in this run."""
        roles = {Role.STUDENT} if self.student is None else set()
        trains = self.sampler is Role.TEACHER
        # the baseline samples the teacher too, and there the student may be equal to it
        equal = _equal_at_start(policy) and not trains
        others = self.student is not None and (self._serves_both(policy) or equal)
        sampled = trains or self.config.orchestrator.eval is not None
        if self.teacher is None and not others and sampled:
            roles.add(Role.TEACHER)
        return roles

    def _serves_both(self, policy: Policy) -> bool:
        """Whether the student's engine has the weights of both roles."""
        separate_weights = not policy.lora or policy.teacher_weights is Weights.OTHER
        live = policy.teacher_weights is Weights.STUDENT
        return self.teacher is None and (live or not separate_weights)

    def attach(self, policy: Policy, prefixes: PrefixCache) -> Engine:
        """Connect the engines to the trainer's model. Returns the run's engine, ready for calls."""
        embedded = EmbeddedEngine(policy, prefixes)
        serves_both = self._serves_both(policy)
        if self.student is not None:
            roles = (Role.STUDENT, Role.TEACHER) if serves_both else (Role.STUDENT,)
            self._connect(self.student, policy, roles, embedded)
        if self.teacher is not None:
            self._connect(self.teacher, policy, (Role.TEACHER,), embedded)
            student = self.student or embedded
            return StudentTeacherEngine(student, self.teacher, sampler=self.sampler)
        if self.student is None:
            return embedded
        if serves_both:
            return self.student
        equal = _equal_at_start(policy)
        return StudentTeacherEngine(
            self.student, embedded, equal_at_start=equal, sampler=self.sampler
        )

    def _connect(
        self, engine: Engine, policy: Policy, roles: tuple[Role, ...], trainer: Engine
    ) -> None:
        engine.attach(policy, roles)
        engine.wait_until_ready()
        samples = Role.STUDENT in roles or self.sampler in roles
        # the trainer never has the weights of a teacher that is another model
        if Role.STUDENT in roles or policy.teacher_weights is not Weights.OTHER:
            temperature = self.config.orchestrator.sampling.temperature
            engine.verify(trainer, temperature if samples else None)

    def close(self) -> None:
        for engine in (self.student, self.teacher):
            if engine is not None:
                engine.close()


def _equal_at_start(policy: Policy) -> bool:
    """Whether both roles have the same weights before the first step."""
    return policy.teacher_weights is Weights.BASE and policy.starts_as_base
