"""A policy and a vLLM engine with its weights, for the benchmarks of engines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.smollm2 import NAMES, smollm2
from minidistill.config import load_config
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import build_options
from minidistill.placement.machine import Machine
from minidistill.placement.planner import plan_run
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.types import Role

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
# Between the engines' log-probs. On a GPU vLLM's fp32 products may use TF32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 1e-4


def named_model(name: str) -> str:
    """A built-in model, a folder, or one of `smollm2.NAMES`."""
    return str(smollm2(name)) if name in NAMES else name


def use_threads(threads: int) -> None:
    """Set the number of threads of this process and of the engines that it starts."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def build(model: str, longest: int | None = None, lora: bool = True) -> tuple[VllmEngine, Policy]:
    """An engine and a policy, both in fp32, on the first GPU or on a CPU.

    Without `lora` every weight is synced. `longest` is the largest number of tokens of a prompt
    with its completion.
    """
    flags = ["--model.name", model, "--inference.engine", "vllm", "--model.dtype", "float32"]
    flags += [] if lora else ["--no-trainer.model.lora"]
    flags += ["--seq_len", str(longest)] if longest else []
    if torch.cuda.is_available():  # the engine and the policy share a GPU
        flags += ["--inference_gpu_ids", "0", "--trainer_gpu_ids", "0"]
        flags += ["--inference.gpu_memory_utilization", "0.3"]
    loaded = load_config([str(ROOT / "configs" / "sokoban.toml"), *flags])
    config, placement = loaded.config, plan_run(loaded, Machine.local()).placement
    student = placement.student
    engine = VllmEngine(build_options(config, student, student.replicas[0], teacher=False), 0)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    policy = load_policy(config, tokenizer, placement)
    engine.attach(policy, (Role.STUDENT, Role.TEACHER) if lora else (Role.STUDENT,))
    engine.wait_until_ready()
    return engine, policy


@torch.no_grad()
def change_adapter(policy: Policy) -> None:
    """Give the policy a random adapter that changes its outputs."""
    for name, parameter in policy.parameters:
        if "lora_B" in name:
            parameter.normal_(0, 0.01)


def save(name: str, key: str, result: dict[str, Any]) -> None:
    """Write a result to bench/results/NAME.json under its key, beside the results of others."""
    target = RESULTS / f"{name}.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps(results | {key: result}, indent=2) + "\n")
