"""Runs whose memory is really limited: they halve what they do at a time, or end with advice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS
from support.runs import board, records
from support.simulated_card import ENVIRONMENT

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK

CONFIG = """
max_steps = 1
seq_len = 1024
model = { name = "tiny-sokoban" }

[trainer]
micro_batch_tokens = 100000
[trainer.optim]
lr = 2e-3
[trainer.loss]
adv_tau = 0.0

[orchestrator]
batch_size = 8
rollouts_per_example = 1
sampling = { max_tokens = 4 }
buffer = { skip_verification = true }
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver with decades of experience.\\n\\n"
[[orchestrator.env]]
id = "jsonl"
args = { path = "PROMPTS", num_eval_examples = 10 }
[orchestrator.eval]
interval = 0
num_examples = 10
"""
STEP = ("--no-orchestrator.eval",)
KL = ("--orchestrator.batch_size", "4")
# MiB. A step runs out of memory below about 95, and again below 50 once it is halved; one sequence
# takes 12 to 25. The KL on held-out prompts runs out below 24, halved below 10, and one prompt
# takes less than 2. The first of each pair is in the middle: processors differ in what they hold.
STEP_MIB, TOO_LITTLE_STEP_MIB = 70, 7
KL_MIB, TOO_LITTLE_KL_MIB = 16, 0
WALL = "#####\n#@$.#\n#   #\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on long prompts."""
    folder = tmp_path_factory.mktemp("long")
    lines = [json.dumps({"prompt": f"{i}\n" + WALL * (18 + i % 3)}) for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "long.toml"
    path.write_text(CONFIG.replace("PROMPTS", str(folder / "prompts.jsonl")))
    return path


def run_on_card(config: Path, path: Path, place: str, mib: int, *flags: str) -> tuple[int, str]:
    """Returns the exit code and the output."""
    done = subprocess.run(
        [
            sys.executable, "-m", "support.simulated_card", place, str(mib),
            "run", str(config), "--output_dir", str(path), *flags,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={
            **os.environ, **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT), *filter(None, sys.path)]),
        },
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def reference_run(config: Path, path: Path, *flags: str) -> None:
    """The run in this process, without a limit."""
    assert cli.main(["run", str(config), "--output_dir", str(path), *flags]) == EXIT_OK


def test_a_micro_batch_that_does_not_fit_is_halved(config: Path, tmp_path: Path) -> None:
    code, output = run_on_card(config, tmp_path / "run", "step", STEP_MIB, *STEP)
    assert code == EXIT_OK, output
    assert "DefaultCPUAllocator" in output
    assert "trainer.micro_batch_tokens is" in output
    reference_run(config, tmp_path / "roomy", *STEP)
    ours, theirs = records(tmp_path / "run"), records(tmp_path / "roomy")
    assert len(ours) == len(theirs) == 1
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-6)


def test_a_sequence_that_does_not_fit_ends_the_run_with_advice(
    config: Path, tmp_path: Path
) -> None:
    code, output = run_on_card(config, tmp_path / "run", "step", TOO_LITTLE_STEP_MIB, *STEP)
    assert code == EXIT_ENVIRONMENT, output
    assert "does not fit in memory" in output
    assert "set trainer.model.ac.freq = 1" in output
    assert "Traceback" not in output


def test_the_held_out_kl_is_halved(config: Path, tmp_path: Path) -> None:
    code, output = run_on_card(config, tmp_path / "run", "held-out KL", KL_MIB, *KL)
    assert code == EXIT_OK, output
    assert output.count("out of memory while computing the KL on held-out prompts") == 1
    reference_run(config, tmp_path / "roomy", *KL)
    ours, theirs = board(tmp_path / "run"), board(tmp_path / "roomy")
    for name in ("heldout_kl_before", "heldout_kl_after", "drift_kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)


def test_a_prompt_that_does_not_fit_alone_ends_the_run_with_advice(
    config: Path, tmp_path: Path
) -> None:
    """A held-out one, or one of the unrelated ones that follow."""
    code, output = run_on_card(config, tmp_path / "run", "held-out KL", TOO_LITTLE_KL_MIB, *KL)
    assert code == EXIT_ENVIRONMENT, output
    error = r"error: out of memory while computing the KL on [a-z-]+ prompts, with one sequence"
    assert re.search(error, output), output
    assert "inference.gpu_memory_utilization" in output
    assert "Traceback" not in output
