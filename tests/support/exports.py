"""Runs to export, and the exported models as their users load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from minidistill.cli import main
from minidistill.models.registry import resolve
from minidistill.trainer.checkpoint import save_model
from support.lab import SMALL_STEP, make_lab

BASE = resolve("tiny-sokoban")


def make_run(configure: Any, folder: Path, *flags: str) -> Path:
    """A finished run with trained weights, a context and a scoreboard."""
    folder.mkdir()
    loaded = configure(*SMALL_STEP, "--output_dir", str(folder), *flags)
    save_model(make_lab(loaded).policy, folder)
    (folder / "config.toml").write_text(loaded.text)
    board = {"verdict": "It is | closed.", "gap_closed": 0.5, "drift_kl": 0.01, "steps": 3}
    (folder / "scoreboard.json").write_text(json.dumps(board))
    return folder


def export(run: Path, to: Path, *flags: str) -> int:
    """The command's exit code. It does not load vLLM."""
    return main(["export", str(run), "--to", str(to), "--no-vllm", *flags])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a row of ids (1, 37, V)."""
    return model.eval()(input_ids=torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def with_adapter(folder: Path) -> Any:
    """The base in fp32 with a PEFT folder."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder)
