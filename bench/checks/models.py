"""Models of a real shape with random weights, and rollouts for them: nothing is downloaded."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.checks.report import SOKOBAN, Setting
from minidistill.config import Config, load_config
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.models.hub import load_tokenizer
from minidistill.models.registry import BUILT_IN, SHIPPED_CONFIGS
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import Machine
from minidistill.placement.planner import plan_run
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.trainer.trainer import Trainer
from minidistill.types import Completion, Prompt, Role, Rollout, Task

SMALL, LARGE = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Instruct-2507"
# In a rehearsal: the same architecture
TINY = {
    "vocab_size": 997, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Nothing ends a run of random weights, and no environment is needed
COMMON = (
    "--inference.engine", "embedded", "--trainer.loss.adv_tau", "0",
    "--trainer.loss.max_sampler_mismatch", "off", "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """A loaded model with its plan, its trainer and its own engine."""

    config: Config
    plan: Plan
    policy: Policy
    trainer: Trainer
    engine: EmbeddedEngine

    def planned_bytes(self) -> int:
        """What the plan says that the trainer allocates while it trains."""
        parts = self.plan.devices[0].phases["training"]
        return sum(
            size
            for name, size in parts.items()
            if name.startswith("trainer") and "CUDA context" not in name
        )


def load(setting: Setting, name: str, *flags: str) -> Job:
    """A model in the shape of `name`, with flags over configs/sokoban.toml."""
    folder = write_shape(setting, name)
    packing = setting.size((), ("--trainer.packing",))  # as a GPU does without being told
    loaded = load_config([SOKOBAN, "--model.name", str(folder), *COMMON, *packing, *flags])
    machine = Machine.local()
    if setting.rehearse:
        machine = replace(machine, gpus=0, vllm=False, bf16=False, bytes=64 << 30)
    plan = plan_run(loaded, machine)
    with random_weights(setting.device):
        policy = load_policy(loaded.config, load_tokenizer(loaded.config), plan.placement)
    prefixes = PrefixCache(policy, shares=True)
    trainer = build_trainer(policy, loaded.config, plan.placement, RankGroup(), prefixes)
    return Job(loaded.config, plan, policy, trainer, EmbeddedEngine(policy, prefixes))


def write_shape(setting: Setting, name: str) -> Path:
    """A model's folder without weights: a shipped configuration, and tiny-sokoban's tokenizer."""
    folder = setting.scratch(name.replace("/", "--"))
    fields = json.loads(SHIPPED_CONFIGS[name].read_text())
    fields |= setting.size({}, TINY)
    (folder / "config.json").write_text(json.dumps(fields))
    for file in BUILT_IN["tiny-sokoban"].iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    return folder


@contextlib.contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Create models on the device in place of reading their weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def create(name: str, *, dtype: torch.dtype, **options: Any) -> Any:
        attention = {k: v for k, v in options.items() if k == "attn_implementation"}
        torch.manual_seed(0)
        with device:
            config = AutoConfig.from_pretrained(name)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention).eval()
        nothing = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return (model, nothing) if options.get("output_loading_info") else model

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", create):
        yield


def make_prompts(
    policy: Policy, count: int, *, context: int, own: int, seed: int = 0
) -> list[Prompt]:
    """Prompts of random ids. The teacher's begin with the same `context` tokens."""
    draw = random.Random(seed)
    vocabulary = policy.head_VH.shape[0]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(length))

    shared, prompts = ids(context), []
    for index in range(count):
        student = ids(own)
        prompts.append(Prompt("", Task(str(index), ()), "", "", student, (*shared, *student)))
    return prompts


def make_rollouts(job: Job, count: int, *, context: int, own: int, new: int) -> list[Rollout]:
    """Rollouts of random ids, with the log-probs that the engine gives them."""
    prompts = make_prompts(job.policy, count, context=context, own=own)
    draw = random.Random(1)
    vocabulary = job.policy.head_VH.shape[0]
    tokens = [tuple(draw.randrange(3, vocabulary) for _ in range(new)) for _ in prompts]
    logprobs = job.engine.score([p.student_ids for p in prompts], tokens, Role.STUDENT)
    return [
        Rollout(prompt, 0, Completion(ids, tuple(scores), "length"), "")
        for prompt, ids, scores in zip(prompts, tokens, logprobs, strict=True)
    ]


def randomize_adapter(policy: Policy) -> None:
    """Give the adapter weights that change the outputs a little."""
    with torch.no_grad():
        for name, parameter in policy.parameters:
            if "lora_B" in name:
                parameter.normal_(0, 0.01)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """The warnings that minidistill logs meanwhile."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler, logger = Collector(logging.WARNING), logging.getLogger("minidistill")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def count_tokens(rollouts: Sequence[Rollout]) -> int:
    """All tokens that the student reads in a step."""
    return sum(rollout.student_length for rollout in rollouts)
