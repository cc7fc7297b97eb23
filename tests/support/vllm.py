"""A vLLM engine with the model it must agree with, and runs whose processes can be listed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minidistill.config import Config, load_config
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import Options, build_options
from minidistill.envs.registry import load_environments
from minidistill.models.hub import load_tokenizer
from minidistill.placement.machine import Machine
from minidistill.placement.placement import Placement, place
from minidistill.placement.planner import load_models
from minidistill.placement.vllm_version import installed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.types import Role
from support import processes
from support.paths import SOKOBAN
from support.plain_forward import completion_logprobs
from support.processes import Started

CPU = torch.device("cpu")
CUDA_BUILD = torch.version.cuda is not None
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(installed() is None, reason="needs vLLM, which is not installed here"),
]
# vLLM's CUDA build does not run on a CPU. What it does on a GPU is tested in test_vllm_gpu.py.
NEEDS_CPU_VLLM = [
    *NEEDS_VLLM,
    pytest.mark.skipif(CUDA_BUILD, reason="needs vLLM's CPU build, and this is its CUDA build"),
]
# No evaluation, few puzzles: a few seconds once vLLM has started
SHORT = (
    "--inference.engine", "vllm", "--max_steps", "5", "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.batch_size", "8",
    "--orchestrator.env.0.args.num_train_examples", "16",
    "--orchestrator.env.0.args.num_eval_examples", "8", "--trainer.scheduler.warmup_steps", "1",
)  # fmt: skip


@dataclass
class Bench:
    """An engine, the policy whose weights it runs, and prompts for it."""

    config: Config
    policy: Policy
    engine: Any
    versions: Iterator[int] = field(default_factory=lambda: count(1))

    def prompts(self, rows: int, length: int = 20) -> list[tuple[int, ...]]:
        """Random token ids, whose log-probs vary widely."""
        generator = torch.Generator().manual_seed(rows * 1000 + length)
        ids = torch.randint(2, 600, (rows, length), generator=generator)
        return [tuple(row) for row in ids.tolist()]

    def puzzles(self, rows: int) -> list[tuple[int, ...]]:
        """The student's prompts of training puzzles, where the model is uncertain."""
        orchestrator = self.config.orchestrator
        teacher = orchestrator.teacher_model
        builder = PromptBuilder(self.policy.tokenizer, teacher.context, teacher.context_placement)
        ((name, environment),) = load_environments(orchestrator.env, "").items()
        return [builder.build(name, environment.train[i]).student_ids for i in range(rows)]

    def sync(self) -> int:
        """Sync the weights as a new version. Returns its number."""
        version = next(self.versions)
        self.engine.sync(version)
        return version

    def change(self, seed: int, scale: float = 0.03) -> None:
        """Set the adapter's B to random values."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.policy.parameters:
            if "lora_B" in name:
                parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def truth(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        role: Role,
        temperature: float = 1.0,
    ) -> list[float]:
        """Log-probs from one plain forward pass of the trainer's model in this role."""
        with self.policy.running_as(role):
            logprobs = completion_logprobs(self.policy.causal, prompt, completion, temperature)
        return logprobs.tolist()


def placement_of(config: Config, *, server: bool = False) -> Placement:
    """The placement on this machine; with `server`, on a server."""
    if server:
        inference = config.inference.model_copy(update={"server_urls": ["http://localhost:1"]})
        config = config.model_copy(update={"inference": inference})
    return place(config, load_models(config), Machine.local())


def options_of(config: Config) -> Options:
    """The options of the student's engine: on a CPU, or on the GPUs of its first replica."""
    student = placement_of(config).student
    return build_options(config, student, student.replicas[0], teacher=False)


def policy_of(config: Config) -> Policy:
    return load_policy(config, load_tokenizer(config), placement_of(config))


def make_bench(*flags: str, max_restarts: int = 2) -> Bench:
    """A started engine that serves the student and, with LoRA, the base."""
    config = load_config([SOKOBAN, "--inference.engine", "vllm", *flags]).config
    engine = VllmEngine(options_of(config), max_restarts)
    try:
        policy = policy_of(config)
        engine.attach(policy, (Role.STUDENT, Role.TEACHER) if policy.lora else (Role.STUDENT,))
        engine.sync(0)
        engine.wait_until_ready()
    except BaseException:
        engine.close()
        raise
    return Bench(config, policy, engine)


def student_error(bench: Bench) -> float:
    """The largest difference between the engine's and the trainer's student log-probs."""
    prompts = bench.prompts(4, length=24)
    heads, tails = [p[:12] for p in prompts], [p[12:] for p in prompts]
    scores = bench.engine.score(heads, tails, Role.STUDENT)
    truth = [bench.truth(h, t, Role.STUDENT) for h, t in zip(heads, tails, strict=True)]
    pairs = zip(scores, truth, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@dataclass
class Run:
    """A run in a subprocess. A mark in its environment is inherited by all processes it starts."""

    process: Started
    path: Path
    mark: str

    def until(self, text: str) -> None:
        """Read the output up to a line that starts with `text`."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(text):
                return
        raise AssertionError(f"the run ended before {text!r}: {''.join(lines)}")

    def rest(self) -> str:
        """Read the output up to its end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def alive(self) -> dict[int, str]:
        """The command lines of all processes with the run's mark, by process id."""
        return processes.marked(self.mark)

    def engine(self) -> int:
        """The id of the vLLM process."""
        return next(id for id, text in self.alive().items() if "engines.vllm.worker" in text)

    def left_behind(self) -> dict[int, str]:
        """The processes that are still alive after some seconds."""
        return processes.left_behind(self.mark)


def start(path: Path, *flags: str, as_users_do: bool = False) -> Run:
    """A short run with vLLM in a subprocess."""
    mark = processes.new_mark()
    command = [sys.executable, "-m", "minidistill", "run", SOKOBAN, *SHORT, *flags]
    command += ["--output_dir", str(path)]
    environment = {processes.MARK: mark, "OMP_NUM_THREADS": "1"}
    process = processes.start(command, as_users_do=as_users_do, **environment)
    return Run(process, path, mark)


def steps(path: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "teacher_kl" in line]


def assert_token_versions_match_metrics(path: Path) -> None:
    """Each token's version is at most one update old; the mean age is `async/staleness`."""
    for step, record in enumerate(steps(path), 1):
        tensors = load_file(path / "rollouts" / f"step_{step:06d}.safetensors")
        ages = step - 1 - tensors["versions"].double()
        assert float(ages.mean()) == pytest.approx(record["async/staleness"])
        assert set(ages.tolist()) <= {0.0, 1.0}
