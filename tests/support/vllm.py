"""An engine beside the model it must agree with, and runs whose processes can be counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
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
from support.paths import ROOT, SOKOBAN

CPU = torch.device("cpu")
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(installed() is None, reason="needs vLLM, which is not installed here"),
]
# No evaluations, few puzzles: a run of seconds, once vLLM is up
SHORT = (
    "--inference.engine", "vllm", "--max_steps", "5", "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.batch_size", "8",
    "--orchestrator.env.0.args.num_train_examples", "16",
    "--orchestrator.env.0.args.num_eval_examples", "8", "--trainer.scheduler.warmup_steps", "1",
)  # fmt: skip


@dataclass
class Bench:
    """An engine, the policy whose adapter it runs, and a few prompts."""

    config: Config
    policy: Policy
    engine: Any
    versions: Iterator[int] = field(default_factory=lambda: count(1))

    def prompts(self, rows: int, length: int = 20) -> list[tuple[int, ...]]:
        """Token ids drawn at random: log-probs of all sizes."""
        generator = torch.Generator().manual_seed(rows * 1000 + length)
        ids = torch.randint(2, 600, (rows, length), generator=generator)
        return [tuple(row) for row in ids.tolist()]

    def puzzles(self, rows: int) -> list[tuple[int, ...]]:
        """Prompts of the environment, after which the model is in doubt."""
        orchestrator = self.config.orchestrator
        teacher = orchestrator.teacher_model
        builder = PromptBuilder(self.policy.tokenizer, teacher.context, teacher.context_placement)
        ((name, environment),) = load_environments(orchestrator.env, "").items()
        return [builder.build(name, environment.train[i]).student_ids for i in range(rows)]

    def sync(self) -> int:
        """Send the weights to the engine as a new version, whose number is returned."""
        version = next(self.versions)
        self.engine.sync(version)
        return version

    def change(self, seed: int, scale: float = 0.03) -> None:
        """Other values in the adapter's B."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.policy.parameters:
            if "lora_B" in name:
                parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def truth(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        role: Role,
        temperature: float = 1.0,
    ) -> list[float]:
        """Log-probs from one plain pass of the trainer's model, adapter on or off."""
        with self.policy.running_as(role):
            logits = self.policy.causal(input_ids=torch.tensor([[*prompt, *completion]])).logits
        logp = (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        return logp.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def placement_of(config: Config, *, server: bool = False) -> Placement:
    """Where a run of this configuration would be on this machine."""
    if server:
        inference = config.inference.model_copy(update={"server_urls": ["http://localhost:1"]})
        config = config.model_copy(update={"inference": inference})
    return place(config, load_models(config), Machine.local())


def options_of(config: Config) -> Options:
    """What the engine that samples is started with, on a CPU."""
    return build_options(config, placement_of(config).student, (), teacher=False)


def policy_of(config: Config) -> Policy:
    return load_policy(config, load_tokenizer(config), placement_of(config))


def make_bench(*flags: str, max_restarts: int = 2) -> Bench:
    """A ready engine that serves the student and, under LoRA, the base."""
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
    """The largest difference of any of the student's log-probs from the trainer's."""
    prompts = bench.prompts(4, length=24)
    heads, tails = [p[:12] for p in prompts], [p[12:] for p in prompts]
    scores = bench.engine.score(heads, tails, Role.STUDENT)
    truth = [bench.truth(h, t, Role.STUDENT) for h, t in zip(heads, tails, strict=True)]
    pairs = zip(scores, truth, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@dataclass
class Run:
    """A run in a process of its own. Whatever it starts inherits a mark in its environment."""

    process: subprocess.Popen[str]
    path: Path
    mark: str

    def until(self, text: str) -> None:
        """Read its output up to a line that begins with `text`."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith(text):
                return
        raise AssertionError(f"the run ended before {text!r}: {''.join(seen)}")

    def rest(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def alive(self) -> dict[int, str]:
        """Processes with the run's mark, the run's own among them, by id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command:  # a zombie has none
                        found[int(folder.name)] = command
            except OSError:  # gone, or another user's
                continue
        return found

    def engine(self) -> int:
        """The id of vLLM's process."""
        return next(id for id, text in self.alive().items() if "engines.vllm.worker" in text)

    def left_behind(self, seconds: float = 10) -> dict[int, str]:
        """What of it is still there after a moment's grace."""
        deadline = time.time() + seconds
        while (found := self.alive()) and time.time() < deadline:
            time.sleep(0.1)
        return found


def start(path: Path, *flags: str) -> Run:
    mark = f"MINIDISTILL_MARK={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "minidistill", "run", SOKOBAN, *SHORT, *flags]
    process = subprocess.Popen(
        [*command, "--output_dir", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Run(process, path, mark)


def steps(path: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "teacher_kl" in line]


def assert_tokens_are_as_old_as_said(path: Path) -> None:
    """Each token's version, an update ago at most, against the metrics' mean age."""
    for step, record in enumerate(steps(path), 1):
        tensors = load_file(path / "rollouts" / f"step_{step:06d}.safetensors")
        ages = step - 1 - tensors["versions"].double()
        assert float(ages.mean()) == pytest.approx(record["async/staleness"])
        assert set(ages.tolist()) <= {0.0, 1.0}
