"""Check 7: a GPU shared with another process, on which the trainer must fit by itself."""

from __future__ import annotations

import math
import multiprocessing
from typing import Any

import torch

from bench.checks.models import SMALL, Job, load, make_prompts, make_rollouts, warnings
from bench.checks.report import Findings, Setting
from minidistill.evaluation.kl import teacher_kl
from minidistill.placement.machine import GIB
from minidistill.trainer.token_budget import TokenBudget

CARD = 23.5 * GIB  # what a card of 24 GB has
ENGINE = 0.55  # of it, for the other process
CONTEXT = 1.0 * GIB  # what the plan assumes for a process's CUDA context


def check(setting: Setting, findings: Findings) -> None:
    """Held-out KL in the shape of configs/own-prompts.toml, then a step that has to be divided."""
    length, new = setting.size((768, 512), (48, 16))
    flags = (
        "--seq_len", str(length), "--orchestrator.sampling.max_tokens", str(new),
        "--trainer.micro_batch_tokens", str(32 * length), "--orchestrator.batch_size", "32",
    )  # fmt: skip
    other = Other(setting, findings)
    try:
        if setting.device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            room = (1 - ENGINE) * CARD - other.context
            torch.cuda.set_per_process_memory_fraction(room / total)
            findings.figure("GiB for this process", room / GIB)
        job = load(setting, SMALL, *flags)
        own = length - new - setting.size(128, 8)
        prompts = make_prompts(job.policy, 4, context=setting.size(128, 8), own=own)
        kl = teacher_kl(job.config, job.policy, job.engine, prompts, TokenBudget()).mean
        findings.figure("held-out KL", kl)
        findings.holds("held-out KL is finite", math.isfinite(kl))
        if setting.device.type == "cuda":
            findings.figure("GiB of held-out KL", torch.cuda.max_memory_allocated() / GIB)
        divided_step(setting, findings, job, length, new)
    finally:
        other.close()


def divided_step(setting: Setting, findings: Findings, job: Job, length: int, new: int) -> None:
    """A step of 32 sequences in one micro-batch, which does not fit and must be divided."""
    context = setting.size(128, 8)
    rollouts = make_rollouts(job, 32, context=context, own=length - new - context, new=new)
    limit = Limit(job, 8 * length) if setting.rehearse else None
    try:
        with warnings() as texts:
            metrics = job.trainer.step(rollouts, 1, lambda count: None).metrics
    finally:
        if limit is not None:
            limit.remove()
    halvings = [text for text in texts if text.startswith("out of memory")]
    findings.figure("warnings of the step", texts)
    findings.at_least("times that the micro-batch was halved", len(halvings), 1)
    findings.holds("the loss is finite", math.isfinite(metrics["loss/total"]))
    findings.figure("GiB of the step", metrics["perf/peak_memory_gib/trainer"])


class Limit:
    """In a rehearsal: a student's pass over more tokens than this is out of memory."""

    def __init__(self, job: Job, tokens: int) -> None:
        self.tokens = tokens
        body = job.policy.causal.base_model
        self._hook = body.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and inputs["input_ids"].numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def remove(self) -> None:
        self._hook.remove()


class Other:
    """Another process, which holds an engine's share of the card."""

    def __init__(self, setting: Setting, findings: Findings) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, remote = spawn.Pipe()
        size = int(ENGINE * CARD) if not setting.rehearse else 1 << 20
        self._process = spawn.Process(target=hold, args=(remote, str(setting.device), size))
        self.context = int(CONTEXT)
        on_gpu = setting.device.type == "cuda"
        if on_gpu:
            torch.zeros(1, device=setting.device)  # this process has its own context first
            before = torch.cuda.mem_get_info()[0]
        self._process.start()
        reserved = self._pipe.recv()
        if on_gpu:
            self.context = before - torch.cuda.mem_get_info()[0] - reserved
            findings.figure("GiB of a CUDA context", self.context / GIB)
            findings.at_most("GiB of a CUDA context", self.context / GIB, CONTEXT / GIB)
        self._pipe.send("hold")
        held = self._pipe.recv()
        findings.figure("GiB that the other process holds", held / GIB)

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def hold(pipe: Any, device: str, size: int) -> None:
    """The other process: a context, then an allocation, until it is told to end."""
    small = torch.ones(8, 8, device=device)
    (small @ small).sum().item()  # loads cuBLAS, as every engine does
    on_gpu = small.is_cuda
    pipe.send(torch.cuda.memory_reserved() if on_gpu else 0)
    pipe.recv()
    block = torch.empty(size, dtype=torch.uint8, device=device)
    pipe.send(block.numel())
    pipe.recv()
