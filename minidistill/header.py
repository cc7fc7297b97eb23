"""What a run says about itself before its first step."""

from __future__ import annotations

from pathlib import Path

from minidistill.config import Config
from minidistill.engines import Engine
from minidistill.trainer.trainer import Trainer
from minidistill.ui import Header

TEACHERS = {
    "frozen": "the base model with the context, adapter off",
    "live": "the student itself with the context",
    "ema": "a moving average of the student with the context",
}


def header(config: Config, trainer: Trainer, engine: Engine, path: Path, step: int) -> Header:
    """Model, mode, teacher, devices and output, for the display."""
    loss, orchestrator, policy = config.trainer.loss, config.orchestrator, trainer.policy
    total = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for _, p in policy.parameters)
    weights = f"{loss.adv_tau:g} A + {loss.teacher_tau:g} log q - {loss.student_tau:g} log π"
    mode = "pure distillation" if loss.adv_tau == 0 else "hybrid"
    dtype = str(policy.dtype).removeprefix("torch.")
    estimator = f"{trainer.estimator} estimator (the teacher's logits are in the trainer)"
    rows = (
        ("model", f"{config.model.name}, {_millions(total - trained)} parameters, {dtype}"),
        ("adapter", f"LoRA rank {config.trainer.model.lora.rank}, {_millions(trained)} parameters"),
        ("mode", f"{mode}: {weights}"),
        ("teacher", f"{TEACHERS[trainer.update]}; {estimator}"),
        ("engine", engine.description),
        ("tasks", ", ".join(e.name for e in orchestrator.env)),
        ("output", str(path)),
    )
    return Header("minidistill", rows, config.max_steps, step)


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
