"""Starting what a run samples and scores with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.replicas import Replicas
from minidistill.engines.server.engine import ServerEngine
from minidistill.engines.server.probe import check_same_model, server_command
from minidistill.engines.student_teacher import StudentTeacherEngine
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import build_options, wants_vllm
from minidistill.estimators import TeacherNeeds
from minidistill.placement.gpus import Partition, engine_share
from minidistill.placement.teacher import Teaching, decide
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Role

Engines = VllmEngine | ServerEngine | Replicas


@dataclass(slots=True)
class Started:
    """vLLM's processes on their way, or servers, if there are any, and where the teacher is."""

    teaching: Teaching
    student: Engines | None = None
    teacher: Engines | None = None
    temperature: float = 1.0
    """At which the student samples."""

    def attach(self, policy: Policy, prefixes: PrefixCache) -> Engine:
        """The run's engine, ready, for the trainer's policy."""
        embedded = EmbeddedEngine(policy, prefixes)
        own_weights = not policy.lora or policy.teacher_weights is Weights.OTHER
        live = policy.teacher_weights is Weights.STUDENT
        serves_both = self.teacher is None and (live or not own_weights)
        if self.student is not None:
            roles = (Role.STUDENT, Role.TEACHER) if serves_both else (Role.STUDENT,)
            self._ready(self.student, policy, roles, embedded)
        if self.teacher is not None:
            self._ready(self.teacher, policy, (Role.TEACHER,), embedded)
            return StudentTeacherEngine(self.student or embedded, self.teacher)
        if self.student is None:
            return embedded
        if serves_both:
            return self.student
        equal = policy.teacher_weights is Weights.BASE
        return StudentTeacherEngine(self.student, embedded, equal_at_start=equal)

    def _ready(
        self, engine: Engines, policy: Policy, roles: Sequence[Role], trainer: Engine
    ) -> None:
        engine.attach(policy, roles)
        engine.wait_until_ready()
        for one in engine.engines if isinstance(engine, Replicas) else [engine]:
            # a teacher's other model is in the trainer nowhere, to compare it with
            other = roles[-1] is Role.TEACHER and policy.teacher_weights is Weights.OTHER
            if isinstance(one, ServerEngine) and not other:
                sampled = (
                    self.temperature if Role.STUDENT in roles and engine is self.student else None
                )
                check_same_model(one, policy, trainer, sampled)

    def close(self) -> None:
        for engine in (self.student, self.teacher):
            if engine is not None:
                engine.close()


def start_engines(
    config: Config,
    device: torch.device,
    parts: Partition,
    teaching: Teaching,
    models: tuple[Any, Any],
    longest: int,
    folder: Path = Path("sync"),
) -> Started:
    """Start vLLM's processes where the run uses vLLM; they load while the caller does. Servers are
    looked at when the trainer's model is there.

    `parts` says on which GPUs, `models` are the configurations of the student's and the teacher's
    model, `longest` the most tokens of prompt and completion, `folder` where servers find adapters.
    """
    started = Started(teaching, temperature=config.orchestrator.sampling.temperature)

    def servers(teacher: bool, urls: Sequence[str]) -> Engines:
        model = models[teacher]
        limit = getattr(model, "max_position_embeddings", None) or longest + 1
        needs = min(longest + 1, limit)  # scoring asks for one token more
        where = f"{'teacher_inference' if teacher else 'inference'}.server_urls"
        command = server_command(config, model, needs, teacher=teacher)
        engines = [
            ServerEngine(url, where, command, needs, folder, config.inference.max_restarts)
            for url in urls
        ]
        return engines[0] if len(engines) == 1 else Replicas(engines)

    def start(teacher: bool) -> Engines:
        table = config.teacher_inference if teacher else config.inference
        if table.server_urls:
            return servers(teacher, table.server_urls)
        gpus, tp = (parts.teacher if teacher else parts.inference), table.parallel.tp
        places = [gpus[i : i + tp] for i in range(0, len(gpus), tp)]
        places = places or [()] * (table.parallel.dp or 1)  # on a CPU
        shares = engine_share(config, parts)
        engines: list[VllmEngine] = []
        try:
            for place in places:
                options = build_options(
                    config, device, models[teacher], longest, teacher=teacher, gpus=place,
                    share=shares[teacher], sleeps=bool({*place} & {*parts.trainer}),
                )  # fmt: skip
                engines.append(VllmEngine(options, config.inference.max_restarts))
            if device.type == "cuda":  # vLLM measures free memory, which what comes next changes
                for engine in engines:
                    engine.wait_until_ready()
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return engines[0] if len(engines) == 1 else Replicas(engines)

    try:
        if wants_vllm(config, device):
            started.student = start(teacher=False)
        elif not config.teacher_inference.server_urls:
            return started
        in_engine = teaching.scorer == "engine"
        if (
            in_engine
            and teaching.estimator.needs is TeacherNeeds.LOGPROBS_AT_IDS
            and not (started.student and started.student.capabilities.scores_ids)
        ):
            started.teaching = decide(config, vllm=True, token_ids=False)
            return started
        served = config.teacher_inference.server_urls
        if served or parts.own_teacher(teaching):
            started.teacher = start(teacher=True)
    except BaseException:
        started.close()
        raise
    return started
