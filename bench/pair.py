"""A policy and a vLLM engine that has its weights: what the benchmarks of engines start from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.smollm2 import smollm2
from minidistill.config import load_config
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import build_options
from minidistill.placement.machine import Machine
from minidistill.placement.placement import place
from minidistill.placement.planner import load_models
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.types import Role

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of log-probs, between the engines


def named_model(name: str) -> str:
    """A built-in model, a folder, or `smollm2` for the one from the package index."""
    return str(smollm2()) if name == "smollm2" else name


def use_threads(threads: int) -> None:
    """In this process, and in the engines' that it starts."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def build(model: str, longest: int | None = None, lora: bool = True) -> tuple[VllmEngine, Policy]:
    """Both in fp32 on the CPU. Without `lora` the engine takes full weights alone.

    `longest` is the most tokens of a prompt and its completion.
    """
    flags = ["--model.name", model, "--inference.engine", "vllm", "--model.dtype", "float32"]
    flags += [] if lora else ["--no-trainer.model.lora"]
    flags += ["--seq_len", str(longest)] if longest else []
    config = load_config([str(ROOT / "configs" / "sokoban.toml"), *flags]).config
    placement = place(config, load_models(config), Machine.local())
    engine = VllmEngine(build_options(config, placement.student, (), teacher=False), 0)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    policy = load_policy(config, tokenizer, placement)
    engine.attach(policy, (Role.STUDENT, Role.TEACHER) if lora else (Role.STUDENT,))
    engine.wait_until_ready()
    return engine, policy


@torch.no_grad()
def change_adapter(policy: Policy) -> None:
    """Another adapter, which makes a difference."""
    for name, parameter in policy.parameters:
        if "lora_B" in name:
            parameter.normal_(0, 0.01)


def save(name: str, key: str, result: dict[str, Any]) -> None:
    """Put figures among the others of bench/results, in place of those of the same key."""
    target = RESULTS / f"{name}.json"
    found = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps(found | {key: result}, indent=2) + "\n")
