"""Which checkpoint is restored, and which are refused."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, Lab, make_lab
from support.paths import SOKOBAN

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer import checkpoint
from minidistill.trainer.checkpoint_files import MANIFEST


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = make_lab(load_config([SOKOBAN, *SMALL_STEP]))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)  # the optimizer has moments
    return lab


@pytest.fixture
def root(lab: Lab, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2. Every weight is the step's number; the lab's are 9."""
    for step in (1, 2):
        fill(lab, step)
        checkpoint.save(lab.trainer, tmp_path, step, {"metrics_lines": 10 * step}, keep=2)
    fill(lab, 9)
    return tmp_path


def fill(lab: Lab, value: float) -> None:
    for _, parameter in lab.policy.parameters:
        parameter.data.fill_(value)


def weights(lab: Lab) -> set[float]:
    return {float(x) for _, p in lab.policy.parameters for x in p.detach().unique()}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json and its checksum, as another version of the program would write them."""
    state, manifest = path / "state.json", path / MANIFEST
    facts = json.loads(state.read_text())
    change(facts)
    state.write_text(json.dumps(facts))
    sums = json.loads(manifest.read_text())
    sums["sha256"]["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    sums["bytes"]["state.json"] = len(state.read_bytes())
    manifest.write_text(json.dumps(sums))


@pytest.mark.parametrize("size", [100, 30_000], ids=["adapter", "state"])
def test_a_disk_that_is_full_is_one_clear_error(lab: Lab, root: Path, size: int) -> None:
    """No file may grow beyond `size` bytes: safetensors then raises an error of its own."""
    before = sorted(p.name for p in root.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match="cannot write") as caught:
            checkpoint.save(lab.trainer, root, 9, {}, keep=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "ulimit -f" in caught.value.fix
    assert before == sorted(p.name for p in root.iterdir())


def test_the_newest_checkpoint_is_restored(lab: Lab, root: Path) -> None:
    assert checkpoint.restore(lab.trainer, root) == {"format": 1, "step": 2, "metrics_lines": 20}
    assert weights(lab) == {2.0}
    assert checkpoint.restore(lab.trainer, root / "empty") is None


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    lab: Lab, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = root / "step_000002" / "state.json"
    state.write_text(state.read_text().replace("20", "21"))
    facts = checkpoint.restore(lab.trainer, root)
    assert facts is not None
    assert facts["step"] == 1
    assert weights(lab) == {1.0}
    assert caplog.messages == [
        "checkpoint step_000002 is damaged (state.json has another checksum): using the one before"
    ]


@pytest.mark.parametrize("number", [2, 99, -1, "2025-01", 1.5, None])
def test_an_unknown_format_is_refused(lab: Lab, root: Path, number: Any) -> None:
    """No older checkpoint is restored in its place, and no weights change."""
    rewrite(root / "step_000002", lambda facts: facts.update(format=number))
    with pytest.raises(UserError) as caught:
        checkpoint.restore(lab.trainer, root)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert f"step_000002 has format {number}" in caught.value.what
    assert caught.value.where.endswith("step_000002/state.json")
    assert "version of minidistill that wrote it" in caught.value.fix
    assert weights(lab) == {9.0}


def test_another_format_may_have_other_files(lab: Lab, root: Path) -> None:
    rewrite(root / "step_000002", lambda facts: facts.update(format=2))
    (root / "step_000002" / MANIFEST).unlink()
    (root / "step_000002" / "state.safetensors").unlink()
    with pytest.raises(UserError, match="step_000002 has format 2"):
        checkpoint.restore(lab.trainer, root)


def test_a_checkpoint_without_a_format_number_is_restored(lab: Lab, root: Path) -> None:
    rewrite(root / "step_000002", lambda facts: facts.pop("format"))
    assert checkpoint.restore(lab.trainer, root) == {"step": 2, "metrics_lines": 20}
    assert weights(lab) == {2.0}
    assert all(torch.isfinite(p).all() for _, p in lab.policy.parameters)
