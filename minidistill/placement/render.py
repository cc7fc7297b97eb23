"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minidistill.errors import EXIT_ENVIRONMENT, UserError, printable
from minidistill.placement.devices import STAGED, Device
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import GIB
from minidistill.placement.placement import Placement

BAR = 24  # cells
COLORS = {"student": "cyan", "teacher": "magenta", "trainer": "green", "engine": "cyan"}

SAMPLES = ("samples", "the teacher's, with the context (off-policy)")
"""The row of a run that samples from the teacher."""


def as_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The plan in JSON's types. Bytes, tokens and operations are integers. `price` is that of a GPU
    hour."""
    placement = plan.placement
    student, teacher = placement.student, placement.teacher_engine
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "change": None if plan.change is None else dict(plan.change),
        "warnings": list(plan.warnings),
        "inference_gpu_ids": list(student.gpus),
        "teacher_gpu_ids": list(teacher.gpus) if teacher else [],
        "trainer_gpu_ids": list(placement.trainer_gpus),
        "inference": {"tp": student.tp, "dp": len(student.gpus) // student.tp},
        "teacher_inference": {
            "tp": plan.config.teacher_inference.parallel.tp,
            "dp": teacher.dp if teacher and teacher.gpus else 0,
        },
        "trainer": {"ranks": placement.ranks, "sharded": placement.sharded},
        "sleeps": placement.sleeps,
        "micro_batch_tokens": placement.micro_batch_tokens,
        "ac_freq": placement.ac_freq,
        "gpu_memory_utilization": student.memory_share if student.gpus else 0.0,
        "teacher_gpu_memory_utilization": teacher.memory_share if teacher and teacher.gpus else 0.0,
        "max_model_len": student.max_length,
        "attention": placement.attention.text,
        "choices": {choice.key: [choice.value, choice.reason] for choice in placement.choices},
        "sample_from": plan.config.orchestrator.sample_from,
        "estimator": placement.teacher.estimator.name,
        "scorer": placement.teacher.scorer,
        "teacher": placement.teacher_text,
        "model": {"name": plan.config.model.name, "parameters": plan.shape.parameters},
        "dtype": placement.dtype,
        "memory": [
            {
                "gpu": device.id,
                "bytes": device.bytes,
                "usable": device.usable,
                "peak": device.peak,
                "phases": {name: dict(parts) for name, parts in device.phases.items()},
            }
            for device in plan.devices
        ],
        "sequences": dict(plan.sequences),
        "tokens_per_step": {stage: work.tokens for stage, work in plan.work.items()},
        "flops_per_step": {stage: work.flops for stage, work in plan.work.items()},
        "timing": _timing_json(plan, price),
    }


def _timing_json(plan: Plan, price: float | None) -> dict[str, Any] | None:
    timing = plan.timing
    if timing is None:
        return None
    return {
        "card": timing.card.name,
        "card_is_assumed": not timing.named,
        "seconds": {
            "sample": timing.sample,
            "teacher": timing.teacher,
            "train": timing.train,
            "step": timing.step,
        },
        "idle": {str(gpu): share for gpu, share in timing.idle.items()},
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": _cost(plan, price),
        "faster": [
            {"change": dict(layout.settings), "step": layout.seconds} for layout in plan.faster
        ],
    }


def _cost(plan: Plan, price: float | None) -> float | None:
    """What the run's GPU hours cost at the price of one."""
    return None if price is None or plan.gpu_hours is None else price * plan.gpu_hours


def show(plan: Plan, console: Console, price: float | None = None) -> None:
    """Print the plan: what runs where, memory by device, work, and whether it fits. With the
    `price` of a GPU hour also what the run costs."""
    for title, text in _head(plan):
        console.print(Text(f"{title:<10}{printable(text)}"))
    console.print()
    console.print(_memory(plan))
    console.print()
    table = Table("a step, at most", "tokens", "FLOP", box=None, pad_edge=False)
    for stage, work in plan.work.items():
        table.add_row(stage, f"{work.tokens:,}", f"{work.flops:.3g}")
    console.print(table)
    console.print()
    for title, text in _timing(plan, price):
        console.print(Text(f"{title:<10}{text}"))
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))
    for problem in plan.problems:
        console.print(Text(problem, "red"))
    if plan.fits:
        console.print(Text("fits", "bold green"))
    else:
        console.print(Text(f"does not fit; {_remedy(plan)}", "bold"))


def _timing(plan: Plan, price: float | None) -> list[tuple[str, str]]:
    """The expected time of a step, of the run and what it costs, what idles, and what is faster;
    if it is not estimated, only that the cost is not known."""
    timing = plan.timing
    if timing is None:
        unknown = "not known: the time of a step is not estimated here"
        return [] if price is None else [("cost", unknown), ("", "")]
    phases = {"sampling": timing.sample, "teacher": timing.teacher, "training": timing.train}
    card = f"{timing.card.name} {timing.card.gib} GB"
    assumed = f"a roofline for {card}{'' if timing.named else ' (assumed)'}, not measured"
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in phases.items())
    idle = ", ".join(f"GPU {gpu} {share:.0%}" for gpu, share in timing.idle.items())
    rows = [
        ("time", f"{timing.step:.1f} s a step: {seconds} ({assumed})"),
        ("idle", f"{timing.mean_idle:.0%} of the GPUs' time: {idle}"),
        ("run", f"{plan.config.max_steps} steps: {plan.hours:.2f} h, {_gpu_hours(plan, price)}"),
    ]
    for index, layout in enumerate(plan.faster):
        title = "" if index else "faster"
        rows.append((title, f"{layout.seconds:.1f} s with {flags(layout.settings)}"))
    return [*rows, ("", "")]


def _gpu_hours(plan: Plan, price: float | None) -> str:
    """`2.25 GPU hours, 4.50 at 2 a GPU hour`, and what is not counted."""
    cost = _cost(plan, price)
    at = "" if cost is None else f", {cost:,.2f} at {price:g} a GPU hour"
    return f"{plan.gpu_hours:.2f} GPU hours{at}, without start, evaluations and checkpoints"


def refusal(plan: Plan, where: str) -> UserError | None:
    """The error (exit code 3) of a run that does not fit, with what `show` prints; None if it does.

    `where` names the settings that are concerned.
    """
    if plan.fits:
        return None
    return UserError(
        f"this run does not fit: {'; '.join(plan.problems)}",
        where=where,
        fix=_remedy(plan),
        exit_code=EXIT_ENVIRONMENT,
    )


def _remedy(plan: Plan) -> str:
    if plan.change is None:
        return "no change of settings was found with which it fits"
    return f"it fits with {flags(plan.change)}"


def choice_rows(placement: Placement) -> list[tuple[str, str]]:
    """The settings of memory with their reasons, as rows under one title."""
    texts = [f"{c.key} {c.value}: {c.reason}" for c in placement.choices]
    return [("memory" if index == 0 else "", text) for index, text in enumerate(texts)]


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are written on the command line."""
    words = []
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        words.append(f"--{key} {text}")
    return " ".join(words)


def summary(plan: Plan) -> str:
    """What is on each device, and how much of its memory is planned."""
    lines = []
    for device in plan.devices:
        names = {name for parts in device.phases.values() for name in parts} - {*STAGED}
        present = {name.partition(":")[0] for name in names}
        owners = " and ".join(owner for owner in COLORS if owner in present)
        memory = f"{device.peak / GIB:.1f} of {device.bytes / GIB:.1f} GiB"
        lines.append(f"{device.name}: {owners}, {memory} planned")
    return "; ".join(lines)


def _head(plan: Plan) -> list[tuple[str, str]]:
    config, shape, placement = plan.config, plan.shape, plan.placement
    lora = config.trainer.model.lora
    trained = "all weights trained"
    if shape.text < shape.parameters:
        trained = f"all {shape.text:,} weights of the language model trained"
    if lora:
        count = shape.adapter(lora)
        trained = f"adapter of rank {lora.rank}, {count:,}"
    rows = [
        (
            "model",
            f"{config.model.name}, {shape.parameters:,} parameters, {placement.dtype}; {trained}",
        ),
        ("teacher", f"{placement.teacher_text}; estimator {placement.teacher.estimator.name}"),
    ]
    if config.orchestrator.sample_from == "teacher":
        rows.append(SAMPLES)
    for name, engine in (("student", placement.student), ("scoring", placement.teacher_engine)):
        if engine is not None and engine.gpus:
            rows.append((name, f"{_gpus(engine.gpus)} ({engine.dp} × tp {engine.tp})"))
    weights = "weights sharded" if placement.sharded else "weights replicated"
    if placement.trainer_gpus:
        text = weights if placement.ranks > 1 else "one rank"
        rows.append(("trainer", f"{_gpus(placement.trainer_gpus)} ({text})"))
    else:
        ranks = f" ({placement.ranks} ranks, {weights})" if placement.ranks > 1 else ""
        rows.append(("trainer", f"the CPU{ranks}"))
    return [*rows, ("attention", placement.attention.text), *choice_rows(placement)]


def _gpus(ids: Sequence[int]) -> str:
    return f"GPU {', '.join(map(str, ids))}"


def _memory(plan: Plan) -> Table:
    table = Table("memory", "phase", "", "GiB", "of which", box=None, pad_edge=False)
    table.columns[3].justify = "right"
    table.columns[2].no_wrap = True
    for device in plan.devices:
        for phase, parts in device.phases.items():
            total = sum(parts.values())
            style = "red" if total > device.usable else ""
            sizes = Text(f"{total / GIB:.1f} / {device.bytes / GIB:.1f}", style)
            table.add_row(device.name, phase, _bar(device, parts), sizes, _parts(parts))
    return table


def _parts(parts: Mapping[str, int]) -> str:
    """`student: weights 7.49, …; trainer: …` in GiB, largest first."""
    texts = []
    for owner in COLORS:
        owned = {name: size for name, size in parts.items() if name.startswith(f"{owner}: ")}
        sizes = [
            f"{name.partition(': ')[2]} {size / GIB:.2f}"
            for name, size in sorted(owned.items(), key=lambda part: -part[1])
            if size >= GIB / 100
        ]
        if sizes:
            texts.append(f"{owner}: {', '.join(sizes)}")
    return "; ".join(texts)


def _bar(device: Device, parts: Mapping[str, int]) -> Text:
    """The device's memory as a bar, colored by owner."""
    bar = Text()
    for owner, color in COLORS.items():
        size = sum(size for name, size in parts.items() if name.startswith(f"{owner}:"))
        bar.append("█" * round(BAR * size / device.bytes), color)
    bar.truncate(BAR)
    bar.append("·" * (BAR - len(bar)), "dim")
    return bar
