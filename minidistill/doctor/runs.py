"""A real run of one step on each engine, with the shipped model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import minidistill_kernels  # noqa: F401 - before transformers imports triton
from minidistill.config import load_config
from minidistill.doctor.packages import installed
from minidistill.doctor.result import Result, failed, passed, skipped
from minidistill.driver.loop import run
from minidistill.placement.vllm_version import PACKAGES

CONFIG = """\
max_steps = 1
seq_len = 256
[model]
name = "tiny-sokoban"
[orchestrator]
batch_size = 8
rollouts_per_example = 4
[orchestrator.sampling]
max_tokens = 12
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver with decades of experience.\\n\\n"
[[orchestrator.env]]
id = "sokoban-env"
[orchestrator.env.args]
num_train_examples = 16
num_eval_examples = 8
"""


def embedded() -> Result:
    """A run whose trainer samples."""
    return _one_step("embedded")


def vllm() -> Result:
    """A run with vLLM, if it is installed."""
    if not any(map(installed, PACKAGES)):
        return skipped("vLLM is not installed")
    return _one_step("vllm")


def _one_step(engine: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="minidistill-doctor-") as name:
        folder = Path(name)
        (folder / "doctor.toml").write_text(CONFIG)
        arguments = [str(folder / "doctor.toml"), "--inference.engine", engine]
        arguments += ["--output_dir", str(folder / "run")]
        code = run(load_config(arguments), resume=False)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = next(record for record in map(json.loads, lines) if record["step"] == 1)
    text = f"a step took {metrics['time/step']:.2g} s, sampler mismatch "
    text += f"{metrics['kl/sampler_mismatch']:.1g}"
    return passed(text) if code == 0 else failed(f"exit code {code}", "see the lines above")
