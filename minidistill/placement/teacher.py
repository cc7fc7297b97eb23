"""Where the teacher is and how its log-probs become a gradient: one decision, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minidistill.config import Config
from minidistill.estimators import ESTIMATORS, FULL, SAMPLED, Estimator, TeacherNeeds


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a run's configuration comes to."""

    scorer: Literal["trainer", "engine"]
    """Who computes the teacher's log-probs of what the student sampled."""
    estimator: Estimator
    needs_own_engine: bool
    """The student's engine cannot serve the teacher, or was asked not to."""
    reason: str
    """Why, for the run's header."""


def decide(config: Config, vllm: bool, token_ids: bool) -> Teaching:
    """`vllm`: the run samples with vLLM. `token_ids`: it can score any ids, not only the sampled.

    An engine gives log-probs of tokens, so `full` keeps the teacher in the trainer; so does every
    estimator that the engine cannot serve.
    """
    loss, teacher = config.trainer.loss, config.orchestrator.teacher_model
    chosen = ESTIMATORS.get(loss.estimator)  # None is "auto"
    other, full_weights = config.separate_teacher, config.trainer.model.lora is False
    frozen = teacher.update == "frozen"
    apart = config.teacher_gpu_ids is not None and (
        config.teacher_gpu_ids != config.inference_gpu_ids
    )
    served = bool(config.teacher_inference.server_urls)
    wanted = apart or other is not None or config.teacher_inference.share is False or served

    def in_trainer(reason: str) -> Teaching:
        return Teaching("trainer", chosen or FULL, False, reason)

    if not vllm and not served:
        return in_trainer("the embedded engine is the trainer's own model")
    if chosen is not None and chosen.reason_for_trainer is not None:
        return in_trainer(chosen.reason_for_trainer)
    if chosen is None and not wanted:
        return in_trainer("its logits give the exact gradient")
    if config.orchestrator.sampling.temperature != 1:
        return in_trainer("vLLM scores given tokens at temperature 1 alone")
    at_ids = chosen is not None and chosen.needs is TeacherNeeds.LOGPROBS_AT_IDS
    if at_ids and (not token_ids or config.inference.server_urls):
        return in_trainer("this vLLM gives no log-probs at chosen ids (it needs its V2 runner)")
    if teacher.update == "ema" and full_weights:
        return in_trainer("the moving average of all weights is there")
    estimator = chosen or SAMPLED
    own = wanted or (full_weights and frozen)
    if served:
        return Teaching("engine", estimator, True, "it has a server of its own")
    reason = "it has an engine of its own" if own else "it shares the student's engine"
    return Teaching("engine", estimator, own, reason)
