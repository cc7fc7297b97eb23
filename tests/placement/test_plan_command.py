"""The `plan` command: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
from support.paths import ROOT, SOKOBAN

from minidistill import cli

LARGE = str(ROOT / "configs" / "sokoban-qwen3-4b.toml")
GIB = 1 << 30

pytestmark = pytest.mark.usefixtures("offline")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", LARGE, "--gpus", "4", "--gpu-memory=80", "--json"]
    assert cli.main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["change"] == {}
    assert said["inference_gpu_ids"] == [0]
    assert said["teacher_gpu_ids"] == [1]
    assert said["trainer_gpu_ids"] == [2, 3]
    assert said["trainer"] == {"ranks": 2, "sharded": False}
    assert said["estimator"] == "sampled"
    assert [device["gpu"] for device in said["memory"]] == [0, 1, 2, 3]
    for device in said["memory"]:
        sums = [sum(parts.values()) for parts in device["phases"].values()]
        assert device["peak"] == max(sums) <= device["usable"] <= 80 * GIB
    batch, layers = 128, 4_022_468_096 - 151936 * 2560
    assert said["tokens_per_step"]["train"] == batch * 2048
    assert said["tokens_per_step"]["sample"] == batch // 8 * 1024 + batch * 1024
    head = 151936 * 2560 * batch * 1024
    assert said["flops_per_step"]["train"] == 4 * layers * batch * 2048 + 4 * head


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", LARGE, "--gpus", "1", "--gpu-memory", "24"]) == 3
    out = capsys.readouterr().out
    assert "4,022,468,096 parameters, bfloat16; adapter of rank 16, 33,030,144" in out
    assert "in the student's engine; estimator sampled" in out
    assert "training needs 45.4 GiB of 22.8 usable" in out
    change = "--trainer.model.ac.freq 1 --inference.gpu_memory_utilization 0.55"
    assert f"does not fit; it would with {change}" in out


def test_a_division_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", LARGE, "--gpus", "2", "--trainer_gpu_ids", "2"]) == 3
    assert "trainer_gpu_ids names GPU 2, the machine has 2" in capsys.readouterr().err


RUN_REFUSES = [
    (LARGE, "1", "--schedule async", "they take turns on the same GPU"),
    (SOKOBAN, "0", "--schedule async", "here the trainer itself samples"),
    (SOKOBAN, "0", "--inference.parallel.dp 2", "the run samples with the embedded engine"),
    (SOKOBAN, "0", "--inference.engine vllm --inference.gpu_memory_utilization 0.5", "is no GPU"),
    (LARGE, "2", "--teacher_inference.parallel.tp 2", "the teacher has no engine of its own"),
    (LARGE, "4", "--trainer.world_size 4", "trainer.world_size = 4, but 2 GPUs train"),
    (LARGE, "8", "--trainer_gpu_ids 5,6,7", "3 GPUs do not divide"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "gpus", "flags", "words"), RUN_REFUSES)
def test_what_a_run_would_refuse(
    file: str, gpus: str, flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", file, "--gpus", gpus, *flags.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "gpus", "flags"),
    [(LARGE, "2", "--schedule async"), (SOKOBAN, "0", "--schedule async --inference.engine vllm")],
)
def test_what_can_be_one_step_ahead(file: str, gpus: str, flags: str) -> None:
    assert cli.main(["plan", file, "--gpus", gpus, *flags.split()]) == 0


@pytest.mark.parametrize(
    "argv",
    [[], ["--gpus", "-1"], ["--gpus"], ["--gpus", "two"], ["--gpu-memory", "0"],
     ["--gpu-memory", "nan"]],
)  # fmt: skip
def test_options_that_cannot_be(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    files = [LARGE] if argv else []
    assert cli.main(["plan", *files, *argv]) == 2
    assert capsys.readouterr().err.startswith("error: ")
