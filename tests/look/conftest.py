"""Runs to look at: a finished one, and one whose adapter is far from the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import runs
from support.lab import SMALL_STEP, make_lab
from support.paths import SOKOBAN

from minidistill.config import load_config
from minidistill.trainer.checkpoint import save_model

CONTEXT = "Name a fruit. "
LEARNING = (
    "--max_steps", "3", "--ckpt.interval", "1", "--ckpt.keep", "2",
    "--trainer.optim.lr", "4e-3", "--trainer.scheduler.warmup_steps", "0",
    "--orchestrator.eval.num_examples", "16", "--orchestrator.env.0.args.num_eval_examples", "16",
    "--orchestrator.eval.interval", "0",
)  # fmt: skip


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    path = tmp_path_factory.mktemp("look") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert runs.run(path, *LEARNING) == 0
    return path


@pytest.fixture
def finished(kept_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(kept_run, tmp_path / "finished"))


@pytest.fixture(scope="session")
def kept_far_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student answers otherwise than its base. No test changes it."""
    path = tmp_path_factory.mktemp("look") / "far"
    path.mkdir()
    context = ["--orchestrator.teacher_model.context", CONTEXT]
    loaded = load_config([SOKOBAN, *SMALL_STEP, "--output_dir", str(path), *context])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("torch.cuda.is_available", lambda: False)
        policy = make_lab(loaded).policy
        for name, parameter in policy.parameters:
            if "lora_B" in name:
                parameter.mul_(2)
        save_model(policy, path)
    (path / "config.toml").write_text(loaded.text)
    (path / "scoreboard.json").write_text(json.dumps({"steps": 3}))
    return path


@pytest.fixture
def far(kept_far_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept_far_run, tmp_path / "far"))
