"""What a run says about itself before its first step."""

from __future__ import annotations

from pathlib import Path

from minidistill.engines.base import Engine
from minidistill.placement.planner import Plan
from minidistill.placement.render import summary
from minidistill.placement.teacher import Teaching
from minidistill.reporting.terminal import Header
from minidistill.trainer.policy import Policy

TEACHERS = {
    "frozen": "the base model with the context",
    "live": "the student itself with the context",
    "ema": "a moving average of the student with the context",
}


def header(
    plan: Plan, policy: Policy, teaching: Teaching, engine: Engine, path: Path, step: int
) -> Header:
    """Model, mode, teacher, devices and output, for the display."""
    config = plan.config
    loss, orchestrator, lora = config.trainer.loss, config.orchestrator, config.trainer.model.lora
    total = sum(p.numel() for p in policy.student.parameters())
    trained = sum(p.numel() for _, p in policy.parameters)
    weights = f"{loss.adv_tau:g} A + {loss.teacher_tau:g} log q - {loss.student_tau:g} log π"
    mode = "pure distillation" if loss.adv_tau == 0 else "hybrid"
    dtype = str(policy.dtype).removeprefix("torch.")
    teacher = TEACHERS[orchestrator.teacher_model.update]
    if other := config.separate_teacher:
        teacher = f"{other} with the context"
    elif lora:
        teacher = teacher.replace("the base model", "the base model, adapter off,")
    size = _millions(total - trained if lora else total)
    ahead: tuple[tuple[str, str], ...] = ()
    if config.schedule == "async":
        ahead = (("schedule", "the next step is sampled while this one is trained on"),)
    rows = (
        ("model", f"{config.model.name}, {size} parameters, {dtype}"),
        ("adapter", f"LoRA rank {lora.rank}, {_millions(trained)} parameters")
        if lora
        else ("trained", "every weight"),
        ("mode", f"{mode}: {weights}"),
        ("teacher", teacher),
        ("estimator", f"{teaching.estimator}, scored in the {teaching.scorer}: {teaching.reason}"),
        ("engine", engine.description),
        ("devices", summary(plan)),
        *ahead,
        *_ranks(policy),
        ("tasks", ", ".join(e.name for e in orchestrator.env)),
        ("output", str(path)),
    )
    return Header("minidistill", rows, config.max_steps, step)


def _ranks(policy: Policy) -> tuple[tuple[str, str], ...]:
    if policy.rank_group.size == 1:
        return ()
    how = "weights divided" if policy.sharded else "weights replicated"
    return (("trainer", f"{policy.rank_group.size} ranks, {how}"),)


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
