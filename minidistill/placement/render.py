"""A plan for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minidistill.errors import printable
from minidistill.placement.planner import GIB, Device, Plan

BAR = 24  # cells
COLORS = {"student": "cyan", "teacher": "magenta", "trainer": "green", "engine": "cyan"}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain types; bytes, tokens and operations as whole numbers."""
    parts = plan.partition
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "change": None if plan.change is None else dict(plan.change),
        "warnings": list(plan.warnings),
        "inference_gpu_ids": list(parts.inference),
        "teacher_gpu_ids": list(parts.teacher),
        "trainer_gpu_ids": list(parts.trainer),
        "inference": {"tp": parts.inference_tp, "dp": parts.inference_dp},
        "teacher_inference": {"tp": parts.teacher_tp, "dp": parts.teacher_dp},
        "trainer": {"ranks": parts.ranks, "sharded": plan.sharded},
        "sleeps": parts.sleeps,
        "estimator": plan.teaching.estimator.name,
        "scorer": plan.teaching.scorer,
        "teacher": plan.teacher,
        "model": {"name": plan.config.model.name, "parameters": plan.shape.parameters},
        "dtype": plan.dtype,
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
    }


def show(plan: Plan, console: Console) -> None:
    """Print the plan: who runs where, memory by GPU, work, and whether it fits."""
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
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))
    for problem in plan.problems:
        console.print(Text(problem, "red"))
    if plan.fits:
        console.print(Text("fits", "bold green"))
    elif plan.change is None:
        console.print("does not fit, and no change of settings was found with which it does")
    else:
        console.print(Text(f"does not fit; it would with {flags(plan.change)}", "bold"))


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are written on the command line."""
    words = []
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        words.append(f"--{key} {text}")
    return " ".join(words)


def summary(plan: Plan) -> str:
    """Each device on a line: who is there, and what of its memory is planned for."""
    lines = []
    for device in plan.devices:
        names = {name.partition(":")[0] for parts in device.phases.values() for name in parts}
        owners = " and ".join(owner for owner in COLORS if owner in names)
        memory = f"{device.peak / GIB:.1f} of {device.bytes / GIB:.1f} GiB"
        lines.append(f"{device.name}: {owners}, {memory} planned for")
    return "; ".join(lines)


def _head(plan: Plan) -> list[tuple[str, str]]:
    config, shape, parts = plan.config, plan.shape, plan.partition
    lora = config.trainer.model.lora
    trained = "all weights trained"
    if lora:
        count = shape.adapter(lora.rank, lora.target_modules)
        trained = f"adapter of rank {lora.rank}, {count:,}"
    rows = [
        ("model", f"{config.model.name}, {shape.parameters:,} parameters, {plan.dtype}; {trained}"),
        ("teacher", f"{plan.teacher}; estimator {plan.teaching.estimator}"),
    ]
    how = "weights split" if plan.sharded else "weights replicated"
    engines = {
        "student": (parts.inference, f"{parts.inference_dp} × tp {parts.inference_tp}"),
        "scoring": (parts.teacher, f"{parts.teacher_dp} × tp {parts.teacher_tp}"),
        "trainer": (parts.trainer, how if parts.ranks > 1 else "one rank"),
    }
    for name, (ids, text) in engines.items():
        if ids:
            rows.append((name, f"GPU {', '.join(map(str, ids))} ({text})"))
    if not parts.trainer:
        ranks = f" ({parts.ranks} ranks, {how})" if parts.ranks > 1 else ""
        rows.append(("trainer", f"the CPU{ranks}"))
    return rows


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
    """`student: weights 7.49, …; trainer: …` in GiB, the largest first."""
    texts = []
    for owner in COLORS:
        own = {name: size for name, size in parts.items() if name.startswith(f"{owner}: ")}
        largest = sorted(own.items(), key=lambda part: -part[1])
        shown = [
            f"{name.partition(': ')[2]} {size / GIB:.2f}"
            for name, size in largest
            if size >= GIB / 100
        ]
        if shown:
            texts.append(f"{owner}: {', '.join(shown)}")
    return "; ".join(texts)


def _bar(device: Device, parts: Mapping[str, int]) -> Text:
    """One cell a part of the device's memory, coloured by who holds it."""
    bar = Text()
    for owner, color in COLORS.items():
        size = sum(size for name, size in parts.items() if name.startswith(f"{owner}:"))
        bar.append("█" * round(BAR * size / device.bytes), color)
    bar.truncate(BAR)
    bar.append("·" * (BAR - len(bar)), "dim")
    return bar
