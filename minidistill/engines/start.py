"""Starting what a run samples and scores with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.kept import Warn
from minidistill.engines.pair import EnginePair
from minidistill.engines.replicas import Replicas
from minidistill.engines.vllm import VllmEngine
from minidistill.engines.vllm_options import build_options, wants_vllm
from minidistill.partition import Partition, engine_share
from minidistill.roles import Teaching, decide
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import BASE, OTHER, STUDENT, Policy


@dataclass(slots=True)
class Started:
    """vLLM's processes on their way, if there are any, and where the teacher is."""

    teaching: Teaching
    student: VllmEngine | Replicas | None = None
    teacher: VllmEngine | Replicas | None = None

    def attach(self, policy: Policy, prefixes: PrefixCache) -> Engine:
        """The run's engine, ready, for the trainer's policy."""
        embedded = EmbeddedEngine(policy, prefixes, policy.teacher)
        if self.student is None:
            return embedded
        own_weights = not policy.lora or policy.teacher == OTHER
        serves_both = self.teacher is None and (policy.teacher == STUDENT or not own_weights)
        self.student.attach(policy, (STUDENT, policy.teacher) if serves_both else (STUDENT,))
        self.student.wait()
        if serves_both:
            return self.student
        if self.teacher is None:
            return EnginePair(self.student, embedded, equal_at_start=policy.teacher == BASE)
        self.teacher.attach(policy, (policy.teacher,))
        self.teacher.wait()
        return EnginePair(self.student, self.teacher)

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
    warn: Warn,
) -> Started:
    """Start vLLM's processes where the run uses vLLM; they load while the caller does.

    `parts` says on which GPUs, `models` are the configurations of the student's and the teacher's
    model, `longest` the most tokens of prompt and completion.
    """
    started = Started(teaching)
    if not wants_vllm(config, device):
        return started

    def start(teacher: bool) -> VllmEngine | Replicas:
        table = config.teacher_inference if teacher else config.inference
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
                engines.append(VllmEngine(options, config.inference.max_restarts, warn))
            if device.type == "cuda":  # vLLM measures free memory, which what comes next changes
                for engine in engines:
                    engine.wait()
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return engines[0] if len(engines) == 1 else Replicas(engines)

    try:
        started.student = start(teacher=False)
        in_engine = teaching.scorer == "engine"
        if in_engine and teaching.estimator == "top_k" and not started.student.scores_ids:
            started.teaching = decide(config, vllm=True, token_ids=False)
            return started
        if parts.teacher or (not parts.trainer and teaching.needs_own_engine):
            started.teacher = start(teacher=True)
    except BaseException:
        started.close()
        raise
    return started
