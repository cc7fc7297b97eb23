"""Starting what a run samples and scores with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minidistill.config import Config
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.pair import EnginePair
from minidistill.engines.vllm import VllmEngine, Warn
from minidistill.engines.vllm_options import build_options, wants_vllm
from minidistill.errors import UserError
from minidistill.roles import Teaching, decide
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.policy import BASE, OTHER, STUDENT, Policy


@dataclass(slots=True)
class Started:
    """vLLM's processes on their way, if there are any, and where the teacher is."""

    teaching: Teaching
    student: VllmEngine | None = None
    teacher: VllmEngine | None = None

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
    config: Config, device: torch.device, models: tuple[Any, Any], longest: int, warn: Warn
) -> Started:
    """Start vLLM's processes where the run uses vLLM; they load while the caller does.

    `models` are the configurations of the student's and the teacher's model, `longest` the most
    tokens of prompt and completion.
    """
    vllm = wants_vllm(config, device)
    started = Started(decide(config, vllm, token_ids=device.type == "cuda"))
    if not vllm:
        return started
    try:
        started.student = _start(config, device, models[0], longest, warn)
        teaching = started.teaching
        if teaching.estimator == "top_k" and not started.student.scores_ids:
            teaching = started.teaching = decide(config, vllm, token_ids=False)
        if teaching.scorer == "engine" and teaching.needs_own_engine:
            started.teacher = _start(config, device, models[1], longest, warn, teacher=True)
    except BaseException:
        started.close()
        raise
    return started


def _start(
    config: Config,
    device: torch.device,
    model: Any,
    longest: int,
    warn: Warn,
    *,
    teacher: bool = False,
) -> VllmEngine:
    gpus = _gpus(config, teacher) if device.type == "cuda" else ()
    options = build_options(config, device, model, longest, teacher=teacher, gpus=gpus)
    engine = VllmEngine(options, config.inference.max_restarts, warn)
    if device.type == "cuda":
        engine.wait()  # it measures free memory, which the trainer's model would change meanwhile
    return engine


def _gpus(config: Config, teacher: bool) -> tuple[int, ...]:
    ids = config.teacher_gpu_ids if teacher else config.inference_gpu_ids
    parallel = (config.teacher_inference if teacher else config.inference).parallel
    ids = ids or list(range(parallel.tp))
    if len(ids) > parallel.tp or (parallel.dp or 1) > 1:
        raise UserError(
            f"GPUs {ids} with tp = {parallel.tp} ask for several replicas, and one engine samples",
            where="inference_gpu_ids, inference.parallel.tp",
            fix=f"set inference.parallel.tp = {len(ids)}, or name {parallel.tp} GPUs",
        )
    return tuple(ids)
