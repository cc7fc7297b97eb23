"""Short runs on a tiny model of any architecture: pure distillation of a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from minidistill import cli

CONFIG = """\
max_steps = 2
seq_len = 256
[model]
name = "{model}"
[ckpt]
interval = 1
[trainer.optim]
lr = 1e-3
[trainer.loss]
adv_tau = 0.0
teacher_tau = 1.0
student_tau = 1.0
[orchestrator]
batch_size = 6
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 6
[orchestrator.buffer]
skip_verification = true
[orchestrator.teacher_model]
context = "Answer in one short word.\\n\\n"
[[orchestrator.env]]
id = "jsonl"
args = {{ path = "{prompts}", num_eval_examples = 1 }}
"""
PROMPTS = ("Name a colour.", "What is the capital of Peru?", "Rain or snow?", "Hi", "Count to 3.")


def write_config(folder: Path, model: Path) -> str:
    """The path of a configuration for the model in the folder `model`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": text, "answer": "x"}) + "\n" for text in PROMPTS)
    )
    config = folder / "config.toml"
    config.write_text(CONFIG.format(model=model, prompts=prompts))
    return str(config)


def train(folder: Path, model: Path, *flags: str) -> int:
    """A run of two steps with the embedded engine, in `folder/run`. Returns the exit code."""
    settings = ("--inference.engine", "embedded", "--output_dir", str(folder / "run"))
    return cli.main(["run", write_config(folder, model), *settings, *flags])
