"""The header that a run shows before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minidistill.config import Config
from minidistill.config.adapter import adapter_folder
from minidistill.config.orchestrator import OrchestratorConfig
from minidistill.config.schema import LoraConfig
from minidistill.driver.selection import NAMES
from minidistill.engines.base import Engine
from minidistill.placement.estimate import Plan
from minidistill.placement.placement import Placement
from minidistill.placement.render import SAMPLES, choice_rows, summary
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.terminal.base import Header
from minidistill.system.files import shown_path
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.policy import Policy

TEACHERS = {
    "frozen": "the base model with the context",
    "live": "the student itself with the context",
    "ema": "a moving average of the student with the context",
}


def header(
    plan: Plan,
    placement: Placement,
    policy: Policy,
    engine: Engine,
    builder: PromptBuilder,
    directory: RunDirectory,
    first_step: int,
    context_count: int = 1,
    history: Sequence[Mapping[str, Any]] = (),
) -> Header:
    """Model, mode, teacher, devices and output. `placement` is the started run's.

    `history` has the records of the steps before `first_step`.
    """
    config = plan.config
    loss, orchestrator, lora = config.trainer.loss, config.orchestrator, config.trainer.model.lora
    trained = sum(p.numel() for _, p in policy.parameters)
    size = _millions(plan.shape.parameters)
    weights = f"{config.model.quantization}, computing in " if config.model.quantization else ""
    model = f"{config.model.name}, {size} parameters, {weights}{placement.dtype}"
    rows = [("model", model)]
    if lora:
        adapter = f"{adapter_kind(lora)}, {_millions(trained)} parameters"
        rows.append(("adapter", f"{adapter}, {placement.adapter_dtype}"))
        if lora.init is not None:
            # a later step starts from a checkpoint, and the adapter may have gone
            folder = adapter_folder(lora.init) if first_step == 1 else lora.init
            rows.append(("starts from", f"the adapter in {folder}"))
    else:
        whole = plan.shape.text == plan.shape.parameters
        part = "" if whole else f" of the language model, {_millions(trained)} parameters"
        rows.append(("trained", f"every weight{part}"))
    mode = "pure distillation" if loss.adv_tau == 0 else "hybrid"
    formula = f"{loss.adv_tau:g} A + {loss.teacher_tau:g} log q - {loss.student_tau:g} log π"
    if placement.teacher.estimator.imitates:
        mode, formula = "supervised", f"{loss.teacher_tau:g} log π of the teacher's samples"
    rows.append(("mode", f"{mode}: {formula}"))
    if orchestrator.sample_from == "teacher":
        rows.append(SAMPLES)
    teacher = TEACHERS[orchestrator.teacher_model.update]
    if config.separate_teacher:
        teacher = f"{config.separate_teacher} with the context"
    elif lora:
        teacher = teacher.replace("the base model", "the base model, adapter off,")
    scored = placement.teacher
    rows += [
        ("teacher", teacher),
        ("estimator", f"{scored.estimator}, scored in the {scored.scorer}: {scored.reason}"),
        ("engine", _with_reason(engine.description, placement.student.reason)),
        ("devices", summary(plan)),
        *choice_rows(placement),
    ]
    rows.append(("attention", placement.attention.text))
    if config.schedule == "async":
        rows.append(("schedule", "the next step is sampled while this one is trained on"))
    if placement.ranks > 1:
        layout = "sharded" if placement.sharded else "replicated"
        rows.append(("trainer", f"{placement.ranks} ranks, weights {layout}"))
    rows += _selection_rows(config)
    rows += _prompt_rows(builder)
    if context_count > 1:
        drawn = ", drawn for each prompt and step" if builder.contexts.are_drawn else ""
        rows.append(("contexts", f"{context_count:,} different ones{drawn}"))
    rows += [
        ("tasks", _tasks(orchestrator)),
        ("output", shown_path(directory.path)),
    ]
    return Header(
        "minidistill",
        tuple(rows),
        config.max_steps,
        first_step,
        directory.path,
        None if orchestrator.eval is None else orchestrator.eval.interval,
        tuple(history),
    )


def _selection_rows(config: Config) -> list[tuple[str, str]]:
    """Which step's weights the run ends with, and when it ends, where that is not the last one."""
    rows = []
    if config.ckpt.best is not None:
        rows.append(("weights", f"those of the best {NAMES[config.ckpt.best]}"))
    if (stopping := config.early_stopping) is not None:
        by = f" by more than {stopping.min_delta:g}" if stopping.min_delta else ""
        count = f"{stopping.patience} evaluation{'s' * (stopping.patience > 1)}"
        text = f"without a better {NAMES[stopping.metric]}{by} in {count}"
        of = "" if config.ckpt.best else "; the weights are the last step's (ckpt.best chooses)"
        rows.append(("stops early", text + of))
    return rows


def _tasks(orchestrator: OrchestratorConfig) -> str:
    """The environments, with their shares if they have weights."""
    total = sum((orchestrator.weights or {}).values())
    return ", ".join(
        env.name if env.weight is None else f"{env.name} {env.weight / total:.0%}"
        for env in orchestrator.env
    )


def _with_reason(text: str, reason: str) -> str:
    return f"{text}: {reason}" if reason else text


def adapter_kind(lora: LoraConfig) -> str:
    """What kind of adapter it is, with its ranks."""
    name = "DoRA" if lora.use_dora else "LoRA"
    scale = " (rank-stabilized)" if lora.use_rslora else ""
    ranks = sorted({lora.rank, *lora.rank_pattern.values()})
    return f"{name} rank {' and '.join(map(str, ranks))}{scale}"


def _prompt_rows(builder: PromptBuilder) -> list[tuple[str, str]]:
    """What the chat template decides beyond what a model's files say."""
    rows = []
    tokenizer = builder.tokenizer
    if ends := builder.end_of_turn_ids - {tokenizer.eos_token_id}:
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
        rows.append(("end of turn", f"{tokens}, as in the chat template"))
    if builder.began is not None:
        rows.append(("date", f"{builder.began:%Y-%m-%d %H:%M:%S} in all prompts of the run"))
    if builder.teacher is not builder.student:
        rows.append(("template", "the teacher's prompts are rendered with its own"))
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
