"""Where the teacher is scored, by which estimator, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minidistill.config import Config
from minidistill.estimators import ESTIMATORS, FULL, SAMPLED, Estimator, TeacherNeeds


@dataclass(frozen=True, slots=True)
class TeacherPlacement:
    """Where the teacher is scored, by which estimator, and why."""

    scorer: Literal["trainer", "engine"]
    """What computes the teacher's log-probs of the student's completions."""
    estimator: Estimator
    needs_own_engine: bool
    """The student's engine cannot serve the teacher, or was configured not to."""
    reason: str
    """Why it is scored there, for people."""


def place_teacher(config: Config, *, separate_engine: bool, scores_ids: bool) -> TeacherPlacement:
    """Place the teacher.

    `separate_engine`: the run samples with an engine outside the trainer. `scores_ids`: that engine
    scores any ids, not only the sampled ones. An engine gives log-probs of single tokens, so `full`
    keeps the teacher in the trainer, as does any estimator that the engine cannot serve.
    """
    chosen = ESTIMATORS.get(config.trainer.loss.estimator)  # None is "auto"
    update, all_weights = config.orchestrator.teacher_model.update, not config.trainer.model.lora
    on_servers = bool(config.teacher_inference.server_urls)
    other_gpus = config.teacher_gpu_ids not in (None, config.inference_gpu_ids)
    asks_for_engine = (
        other_gpus
        or on_servers
        or config.separate_teacher is not None
        or config.teacher_inference.share is False
    )

    def in_trainer(reason: str) -> TeacherPlacement:
        return TeacherPlacement("trainer", chosen or FULL, False, reason)

    if not separate_engine and not on_servers:
        return in_trainer("the embedded engine is the trainer's own model")
    if chosen is not None and chosen.reason_for_trainer is not None:
        return in_trainer(chosen.reason_for_trainer)
    if chosen is None and not asks_for_engine:
        return in_trainer("its logits give the exact gradient")
    if config.orchestrator.sampling.temperature != 1:
        return in_trainer("vLLM scores given tokens at temperature 1 only")
    needs_ids = chosen is not None and chosen.needs is TeacherNeeds.LOGPROBS_AT_IDS
    if needs_ids and config.orchestrator.sample_from == "teacher":
        return in_trainer("the sampler's most likely ids are the teacher's, not the student's")
    if needs_ids and (not scores_ids or config.inference.server_urls):
        return in_trainer("this vLLM gives no log-probs at chosen ids (it needs its V2 runner)")
    if update == "ema" and all_weights:
        return in_trainer("the moving average of all weights is there")
    estimator = chosen or SAMPLED
    if on_servers:
        return TeacherPlacement("engine", estimator, True, "it has a server of its own")
    needs_own = asks_for_engine or (all_weights and update == "frozen")
    reason = "it has an engine of its own" if needs_own else "it shares the student's engine"
    return TeacherPlacement("engine", estimator, needs_own, reason)
