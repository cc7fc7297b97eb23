"""The comparison of two runs reports every change, and nothing for equal runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tools.compare_checkouts import compare_runs, main

Files = dict[str, object]
METRICS = {"step": 1, "teacher_kl": 0.25, "time/step": 3.0, "perf/train_tokens_per_second": 9.0}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **changes: object) -> Path:
        """A run directory of one step. `changes` replaces values."""
        run = tmp_path / name
        for folder in ("rollouts", "adapter"):
            (run / folder).mkdir(parents=True)
        metrics = METRICS | changes.get("metrics", {})  # type: ignore[operator]
        (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        board = {"student": 0.5, "seconds": changes.get("seconds", 1.0)}
        (run / "scoreboard.json").write_text(json.dumps(board))
        record = {"task_id": "train/1", "tokens": ["U", changes.get("token", "D")]}
        (run / "rollouts" / "step_000001.jsonl").write_text(json.dumps(record) + "\n")
        tensors = {
            "token_ids": np.array([4, changes.get("token_id", 7)]),
            "kl": np.array([changes.get("kl", 0.5), 0.25], np.float32),
        }
        save_file(tensors, run / "rollouts" / "step_000001.safetensors")
        weights = np.full((2, 2), changes.get("weight", 1.0), np.float32)
        save_file({"lora_A": weights}, run / "adapter" / "adapter_model.safetensors")
        return run

    return make


def test_equal_runs_agree(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    timings = {"time/step": 4.0, "perf/train_tokens_per_second": 8.0}
    before, after = make_run("before"), make_run("after", metrics=timings, seconds=2.0)
    assert main([str(before), str(after)]) == 0
    assert "the runs agree; max abs difference 0" in capsys.readouterr().out
    compared = {c.file: c.values for c in compare_runs(before, after)}
    assert compared == {
        "metrics.jsonl": 2,
        "scoreboard.json": 1,
        "rollouts/step_000001.jsonl": 3,
        "rollouts/step_000001.safetensors": 4,
        "adapter/adapter_model.safetensors": 4,
    }


@pytest.mark.parametrize(
    ("change", "file", "tolerated"),
    [
        ({"metrics": {"teacher_kl": 0.25 + 5e-7}}, "metrics.jsonl", True),
        ({"metrics": {"teacher_kl": 0.25 + 2e-6}}, "metrics.jsonl", False),
        ({"metrics": {"step": 2}}, "metrics.jsonl", False),
        ({"metrics": {"step": 1.0}}, "metrics.jsonl", False),
        ({"metrics": {"teacher_kl": float("nan")}}, "metrics.jsonl", False),
        ({"token": "L"}, "rollouts/step_000001.jsonl", False),
        ({"token_id": 8}, "rollouts/step_000001.safetensors", False),
        ({"kl": 0.5 + 5e-7}, "rollouts/step_000001.safetensors", True),
        ({"kl": 0.5 + 2e-6}, "rollouts/step_000001.safetensors", False),
        ({"kl": float("nan")}, "rollouts/step_000001.safetensors", False),
        ({"weight": 1.0 + 5e-7}, "adapter/adapter_model.safetensors", True),
        ({"weight": 1.001}, "adapter/adapter_model.safetensors", False),
    ],
)
def test_one_changed_value_differs(
    make_run: Callable[..., Path], change: dict[str, object], file: str, tolerated: bool
) -> None:
    before, after = make_run("before"), make_run("after", **change)
    assert [c.file for c in compare_runs(before, after) if c.differences] == [file]
    assert main([str(before), str(after)]) == 1
    assert main([str(before), str(after), "--vllm"]) == (0 if tolerated else 1)


def test_the_largest_difference_is_reported(make_run: Callable[..., Path]) -> None:
    before, after = make_run("before"), make_run("after", kl=0.75, metrics={"teacher_kl": 0.125})
    largest = {c.file: c.max_difference for c in compare_runs(before, after)}
    assert largest["rollouts/step_000001.safetensors"] == 0.25
    assert largest["metrics.jsonl"] == 0.125
    assert largest["adapter/adapter_model.safetensors"] == 0


def test_added_keys_are_listed_and_missing_keys_differ(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = make_run("before"), make_run("after", metrics={"new/metric": 1.0})
    assert main([str(before), str(after)]) == 0
    assert "metrics.jsonl: only the second run has new/metric" in capsys.readouterr().out
    assert main([str(before), str(after), "--strict"]) == 1
    assert main([str(after), str(before)]) == 1
    assert "[0].new/metric: missing" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["rollouts/step_000001.jsonl", "scoreboard.json"])
def test_a_missing_file_differs(make_run: Callable[..., Path], file: str) -> None:
    before, after = make_run("before"), make_run("after")
    (after / file).unlink()
    assert main([str(before), str(after)]) == main([str(after), str(before)]) == 1
    shutil.copy(before / file, after / file)
    assert main([str(before), str(after)]) == 0
