"""The registry of estimators, an added estimator, and what each needs from the teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT, SOKOBAN, TESTS
from support.runs import TINY, records, run

from minidistill.config import load_config
from minidistill.errors import EXIT_OK, UserError
from minidistill.estimators import ESTIMATORS, Estimator, TeacherNeeds
from minidistill.trainer.objective import loss_settings
from minidistill.types import Completion, TeacherScores

BRIEF = (
    "--max_steps", "2", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
)  # fmt: skip
HALF_TAUS = ("--trainer.loss.teacher_tau", "0.25", "--trainer.loss.student_tau", "0.25")


def run_with_added_estimator(path: Path, *flags: str) -> Any:
    command = [sys.executable, "-m", "support.half_divergence", "run", SOKOBAN, *TINY, *BRIEF]
    estimator = ("--trainer.loss.estimator", "half_divergence")
    return subprocess.run(
        [*command, *estimator, "--output_dir", str(path), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
    )  # fmt: skip


def test_an_added_estimator_trains(tmp_path: Path) -> None:
    """`half_divergence` is bitwise equal to `full` with half of both taus."""
    done = run_with_added_estimator(tmp_path / "added")
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    assert "half_divergence, scored in the trainer" in done.stdout
    flags = (*BRIEF, "--trainer.loss.estimator", "full", *HALF_TAUS)
    assert run(tmp_path / "full", *flags) == EXIT_OK
    added, full = records(tmp_path / "added"), records(tmp_path / "full")
    assert [record["step"] for record in added] == [1, 2]
    for ours, theirs in zip(added, full, strict=True):
        assert abs(ours["loss/kl"]) > 1e-3
        # this metric is computed from the configured taus and not from the estimator's loss
        del ours["combined_advantage"], theirs["combined_advantage"]
        assert ours == theirs
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("added", "full")
    )
    assert one == other


def test_an_estimator_that_is_not_registered_is_refused() -> None:
    with pytest.raises(UserError, match="half_divergence"):
        load_config([SOKOBAN, "--trainer.loss.estimator", "half_divergence"])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_kl_clip(name: str) -> None:
    """5 nats for one-sample estimates and none otherwise, unless the configuration sets one."""
    estimator = ESTIMATORS[name]

    def clip(*flags: str) -> float | None:
        return loss_settings(load_config([SOKOBAN, *flags]).config, estimator, 640).kl_clip

    assert clip() == (5.0 if name == "sampled" else None)
    assert clip("--trainer.loss.kl_clip", "off") is None
    assert clip("--trainer.loss.kl_clip", "2.5") == 2.5


def test_engine_scores_become_the_kernels_inputs() -> None:
    """The number of ids to score beside the sampled one, and the inputs made of the scores."""
    completions = [Completion((5, 6), (-1.0, -2.0), "eos", top_ids=[[5, 9], [7, 6]])]
    scores = [TeacherScores([-0.5, -0.25], [[-0.5, -3.0], [-4.0, -0.25]])]

    def inputs(estimator: Estimator) -> dict[str, Any]:
        tensors = estimator.engine_scores(scores, completions, torch.device("cpu"))
        return {name: value.tolist() for name, value in tensors.items()}  # type: ignore[attr-defined]

    sampled, top_k, full = (ESTIMATORS[name] for name in ("sampled", "top_k", "full"))
    assert [e.top_ids(64) for e in (sampled, top_k, full)] == [0, 64, 0]
    assert inputs(sampled) == {"teacher_logp_N": [-0.5, -0.25]}
    assert inputs(top_k) == {
        "teacher_logp_N": [-0.5, -0.25],
        "topk_ids_NK": [[5, 9], [7, 6]],
        "teacher_topk_logp_NK": [[-0.5, -3.0], [-4.0, -0.25]],
    }
    assert full.needs is TeacherNeeds.ALL_LOGITS
    with pytest.raises(ValueError, match="all logits"):
        inputs(full)


def test_importing_the_estimators_imports_no_torch() -> None:
    program = (
        "import sys, minidistill.config, minidistill.estimators; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
