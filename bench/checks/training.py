"""Checks 4 and 10: a training step in a real model's shape. Memory against the plan, and speed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.checks.models import LARGE, SMALL, Job, count_tokens, load, make_rollouts
from bench.checks.report import Findings, Setting
from bench.kernels_report import PEAKS
from minidistill.placement.machine import GIB
from minidistill.trainer.guards import is_out_of_memory
from minidistill.types import Rollout

MEMORY_ERROR = 0.15  # of the plan, relative to what was allocated
FLOPS_SHARE = 0.45  # goal: model FLOPs over the card's bf16 peak
ATTENTION = ("attention", "attn", "flash", "fmha", "sdpa")  # in names of operators and kernels
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def micro_batch(setting: Setting, findings: Findings) -> None:
    """The 4B shape, LoRA, one micro-batch of 4,096 tokens: two sequences of 2,048."""
    length = setting.size(2048, 64)
    flags = (
        "--seq_len", str(length), "--trainer.micro_batch_tokens", str(2 * length),
        "--orchestrator.sampling.max_tokens", str(length // 2),
        "--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "2",
    )  # fmt: skip
    for name, more in (
        ("plain", ("--no-trainer.model.ac",)),
        ("checkpointed", ("--trainer.model.ac.freq", "1")),
    ):
        with_step(setting, findings, name, LARGE, (*flags, *more), length)
        gc.collect()  # of the first model, before the second one is created
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def full_fine_tuning(setting: Setting, findings: Findings) -> None:
    """Every weight of the 0.6B shape in bf16, with fp32 copies in the optimizer."""
    length = setting.size(2048, 64)
    flags = (
        "--seq_len", str(length), "--trainer.micro_batch_tokens", str(2 * length),
        "--orchestrator.sampling.max_tokens", str(length // 2),
        "--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "2",
        "--no-trainer.model.lora", "--trainer.optim.lr", "1e-5",
        "--model.dtype", "bfloat16",
    )  # fmt: skip
    with_step(setting, findings, "full", SMALL, flags, length)


def with_step(
    setting: Setting,
    findings: Findings,
    name: str,
    model: str,
    flags: Sequence[str],
    length: int,
) -> None:
    """Measure steps of two sequences of `length` tokens. Out of memory is a missed limit."""
    try:
        job = load(setting, model, *flags)
        context, new = setting.size(16, 8), length // 2
        rollouts = make_rollouts(job, 2, context=context, own=length - new - context, new=new)
        _measure(setting, findings, name, job, rollouts)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        findings.figure(f"{name}: error", str(error).partition("\n")[0][:200])
        findings.holds(f"{name}: the step fits", False)


def _measure(
    setting: Setting, findings: Findings, name: str, job: Job, rollouts: Sequence[Rollout]
) -> None:
    number, results = 0, []

    def step() -> None:
        nonlocal number
        number += 1
        results.append(job.trainer.step(rollouts, number, lambda count: None))

    step()  # creates the optimizer's state
    seconds = setting.seconds(step, setting.size(3, 1))
    metrics = results[-1].metrics
    findings.holds(f"{name}: the loss is finite", math.isfinite(metrics["loss/total"]))
    findings.figure(f"{name}: warnings", job.plan.warnings)
    findings.figure(f"{name}: attention", job.policy.attention.text)

    peak = metrics["perf/peak_memory_gib/trainer"]
    planned = job.planned_bytes() / GIB
    findings.figure(f"{name}: planned GiB", planned)
    findings.figure(f"{name}: allocated GiB", peak)
    if setting.device.type == "cuda":
        findings.figure(f"{name}: reserved GiB", torch.cuda.max_memory_reserved() / GIB)
    error = abs(planned - peak) / peak
    findings.at_most(f"{name}: error of the plan", error, MEMORY_ERROR, gpu_only=True)

    findings.figure(f"{name}: seconds", seconds)
    findings.figure(f"{name}: tokens/s", count_tokens(rollouts) / seconds)
    share = model_flops(job, rollouts) / seconds / (matrix_peak(setting) or float("nan"))
    if name == "plain":
        findings.at_least(f"{name}: model FLOPs share", share, FLOPS_SHARE, gpu_only=True)
    else:
        findings.figure(f"{name}: model FLOPs share", share)
    profiled = profile_step(setting, job, step)
    findings.figure(f"{name}: profile", profiled)
    if setting.device.type == "cuda":
        busy = profiled["milliseconds"] / 1e3 / seconds
        findings.figure(f"{name}: share of the time that kernels run", busy)


def model_flops(job: Job, rollouts: Sequence[Rollout]) -> float:
    """FLOPs of the teacher's pass and of the student's forward and backward pass, as in
    minidistill.placement.flops: recomputed activations and attention between tokens do not count.
    """
    shape = job.plan.shape
    body, head = shape.body, shape.vocab * shape.hidden
    student = sum(r.student_length for r in rollouts)
    teacher = sum(r.teacher_length for r in rollouts)
    completions = sum(len(r.completion.token_ids) for r in rollouts)
    passes = 4 if job.policy.lora else 6
    return 2.0 * body * teacher + passes * body * student + (2 + passes) * head * completions


def matrix_peak(setting: Setting) -> float | None:
    """The card's dense bf16 FLOP/s, from its data sheet; None for a card that is not listed."""
    if setting.device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(0)
    return next((rates[0] * 1e12 for card, rates in PEAKS.items() if card in name), None)


def profile_step(setting: Setting, job: Job, step: Callable[[], None]) -> dict[str, Any]:
    """Where a step's time goes: shares of kinds of kernels, attention, synchronizations.

    On a GPU the times are those of kernels, on a CPU those of operators.
    """
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, record_shapes=True) as record:
        step()
        setting.synchronize()
    lora = job.config.trainer.model.lora
    times: dict[str, float] = {}
    for event in record.key_averages(group_by_input_shape=True):
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type != DeviceType.CPU and on_gpu:
            continue  # a kernel; its time is counted with the operator that launched it
        kind = _kind(event.key, event.input_shapes, lora.rank if lora else 0, job)
        times[kind] = times.get(kind, 0.0) + time
    total = sum(times.values()) or float("nan")
    events = record.key_averages()
    attention = {
        event.key: event.count
        for event in events
        if any(word in event.key.lower() for word in ATTENTION)
    }
    return {
        "milliseconds": total / 1e3,
        "shares": {kind: time / total for kind, time in sorted(times.items())},
        "attention": attention,
        "stream synchronizations": sum(e.count for e in events if e.key in SYNCS),
        "values read by the host": sum(e.count for e in events if e.key == "aten::item"),
        "copies": sum(e.count for e in events if e.key.startswith("cudaMemcpy")),
    }


def _kind(key: str, shapes: Sequence[Any], rank: int, job: Job) -> str:
    """The kind of an operator. The adapter's products are those with a dimension of its rank."""
    sizes = {size for shape in shapes or () if isinstance(shape, list) for size in shape}
    name = key.removeprefix("aten::")
    if any(word in name for word in ATTENTION):
        return "attention"
    if name in ("mm", "addmm", "bmm", "matmul", "linear", "_addmm_activation"):
        if rank in sizes:
            return "products of the adapter"
        return "products of the head" if job.plan.shape.vocab in sizes else "products of the base"
    if "minidistill_kernels" in name:
        return "row kernels"
    if name in ("copy_", "_to_copy", "cat", "clone", "fill_", "zero_"):
        return "casts and copies"
    return "other"
