"""The `plan` command: its output and its errors."""

from __future__ import annotations

import json

import pytest
from support.paths import ROOT, SOKOBAN

from minidistill import cli

LARGE = str(ROOT / "configs" / "sokoban-qwen3-4b.toml")
GIB = 1 << 30

pytestmark = pytest.mark.usefixtures("offline")


def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", LARGE, "--gpus", "4", "--gpu-memory=80", "--json"]
    assert cli.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is True
    assert printed["change"] == {}
    assert printed["inference_gpu_ids"] == [0, 1]
    assert printed["teacher_gpu_ids"] == []
    assert printed["trainer_gpu_ids"] == [2, 3]
    assert printed["trainer"] == {"ranks": 2, "sharded": False}
    assert printed["estimator"] == "full"
    assert printed["gpu_memory_utilization"] == 0.9
    assert (printed["micro_batch_tokens"], printed["ac_freq"]) == (8192, 0)
    assert printed["max_model_len"] == 2049
    assert [device["gpu"] for device in printed["memory"]] == [0, 1, 2, 3]
    for device in printed["memory"]:
        sums = [sum(parts.values()) for parts in device["phases"].values()]
        assert device["peak"] == max(sums) <= device["usable"] <= 80 * GIB
    batch, layers = 128, 4_022_468_096 - 151936 * 2560
    tokens = batch // 8 * 1024 + batch * 1024  # each prompt once
    assert printed["tokens_per_step"]["train"] == tokens
    assert printed["tokens_per_step"]["sample"] == tokens
    head = 151936 * 2560 * batch * 1024
    assert printed["flops_per_step"]["train"] == 4 * layers * tokens + 4 * head


def test_text_output(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--inference.gpu_memory_utilization",
        "0.9",
        "--no-trainer.model.ac",
        "--seq_len",
        "4096",
    ]
    assert cli.main(["plan", LARGE, "--gpus", "1", "--gpu-memory", "24", *flags]) == 3
    out = capsys.readouterr().out
    assert "4,022,468,096 parameters, bfloat16; adapter of rank 16, 33,030,144" in out
    assert "in the trainer: its logits give the exact gradient; estimator full" in out
    assert "inference.gpu_memory_utilization 0.9 of GPU 0: set in the configuration" in out
    assert "training needs" in out
    assert "GiB of 22.8 usable" in out
    change = "--trainer.model.ac.freq 1 --inference.gpu_memory_utilization auto"
    assert f"does not fit; it fits with {change}" in out
    assert " s a step" not in out


def test_the_run_in_gpu_hours_and_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Four GPUs, of which the two that train are idle most of the time, are all paid."""
    argv = ["plan", LARGE, "--gpus", "4", "--gpu-memory", "80", "--max_steps", "900"]
    assert cli.main([*argv, "--gpu-price", "2.5", "--json"]) == 0
    timing = json.loads(capsys.readouterr().out)["timing"]
    hours = timing["seconds"]["step"] / 4  # 900 steps are a quarter of 3,600
    assert timing["hours"] == pytest.approx(hours)
    assert timing["gpu_hours"] == pytest.approx(4 * hours)
    assert timing["cost"] == pytest.approx(10 * hours)
    assert cli.main([*argv, "--gpu_price=2.5"]) == 0
    text = f"{hours:.2f} h, {4 * hours:.2f} GPU hours, {10 * hours:.2f} at 2.5 a GPU hour, without"
    assert f"run       900 steps: {text} start" in capsys.readouterr().out
    assert cli.main(argv) == 0
    assert f"{4 * hours:.2f} GPU hours, without start" in capsys.readouterr().out


def test_a_cost_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", SOKOBAN, "--gpus", "0", "--gpu-price", "2"]) == 0
    assert "cost      not known: the time of a step is not estimated" in capsys.readouterr().out
    assert cli.main(["plan", SOKOBAN, "--gpus", "0"]) == 0
    assert "cost" not in capsys.readouterr().out


def test_gpus_that_the_machine_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", LARGE, "--gpus", "2", "--trainer_gpu_ids", "2"]) == 3
    assert "trainer_gpu_ids names GPU 2, the machine has 2" in capsys.readouterr().err


REFUSED_BY_A_RUN = [
    (LARGE, "1", "--schedule async", "they take turns on the same GPU"),
    (SOKOBAN, "0", "--schedule async", "here the trainer itself samples"),
    (SOKOBAN, "0", "--inference.parallel.dp 2", "the run samples with the embedded engine"),
    (SOKOBAN, "0", "--inference.engine vllm --inference.gpu_memory_utilization 0.5", "is no GPU"),
    (LARGE, "2", "--teacher_inference.parallel.tp 2", "the teacher has no engine of its own"),
    (LARGE, "4", "--trainer.world_size 4", "trainer.world_size = 4, but 2 GPUs train"),
    (LARGE, "8", "--trainer_gpu_ids 5,6,7", "3 GPUs do not divide"),
    (LARGE, "1", "--trainer.world_size 4", "trainer.world_size = 4, but 1 GPU trains"),
    (LARGE, "1", "--inference.parallel.tp 2", "(dp 1 × tp 2), and 1 is left for it"),
    (SOKOBAN, "0", "--trainer.model.lora.target_modules nope", "target_modules names nope"),
    (LARGE, "1", "--trainer.model.lora.target_modules q_proj,v", "target_modules names v: the"),
    (SOKOBAN, "0", "--seq_len 9000 --orchestrator.sampling.max_tokens 5000", "takes 1024 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "gpus", "flags", "message"), REFUSED_BY_A_RUN)
def test_plan_refuses_what_a_run_would(
    file: str, gpus: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", file, "--gpus", gpus, *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_longer_sequence_than_the_model_takes_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan is that of the model's limit, in its work too."""
    plans = []
    for length in ("1024", "100000"):
        argv = ["plan", SOKOBAN, "--gpus", "1", "--seq_len", length, "--json"]
        assert cli.main(argv) == 0
        plans.append(json.loads(capsys.readouterr().out))
    exact, longer = plans
    assert exact["warnings"] == []
    assert longer["warnings"] == [
        "seq_len = 100000 is too long: 1024 tokens, the most that the model takes, are used"
    ]
    assert longer | {"warnings": []} == exact
    assert exact["max_model_len"] == 1024
    assert exact["choices"]["max_model_len"] == ["1,024 tokens", "the longest sequence"]


def test_a_machine_without_an_engine_on_gpus_has_no_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", SOKOBAN, "--gpus", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gpu_memory_utilization"] == printed["teacher_gpu_memory_utilization"] == 0
    assert printed["attention"] == (
        "varlen, sequences are packed, prompts computed once: "
        "llama models attend causally to all tokens"
    )


@pytest.mark.parametrize(
    ("file", "gpus", "flags"),
    [(LARGE, "2", "--schedule async"), (SOKOBAN, "0", "--schedule async --inference.engine vllm")],
)
def test_async_schedules_that_are_possible(file: str, gpus: str, flags: str) -> None:
    assert cli.main(["plan", file, "--gpus", gpus, *flags.split()]) == 0


INVALID_OPTIONS = [
    ([], "no configuration file is given", "minidistill plan sokoban"),
    (["--gpus", "-1"], "--gpus '-1' cannot be used", "a whole number of GPUs, 0 for a CPU"),
    (["--gpus=-1"], "--gpus '-1' cannot be used", "a whole number of GPUs, 0 for a CPU"),
    (["--gpus", "two"], "--gpus 'two' cannot be used", "a whole number of GPUs, 0 for a CPU"),
    (["--gpus", "1.5"], "--gpus '1.5' cannot be used", "a whole number of GPUs, 0 for a CPU"),
    (["--gpus"], "--gpus: expected one argument", "minidistill plan --help"),
    (["--gpu-memory", "0"], "--gpu-memory '0' cannot be used", "GiB above 0"),
    (["--gpu-memory", "nan"], "--gpu-memory 'nan' cannot be used", "GiB above 0"),
    (["--gpu_memory=inf"], "--gpu-memory 'inf' cannot be used", "GiB above 0"),
    (["--gpu-price", "-1"], "--gpu-price '-1' cannot be used", "price of a GPU hour, above 0"),
    (["--gpu-price=free"], "--gpu-price 'free' cannot be used", "price of a GPU hour, above 0"),
    # options cannot be abbreviated
    (["--gpu", "1"], "there is no gpu", "the top level takes: max_steps"),
]


@pytest.mark.parametrize(("argv", "what", "fix"), INVALID_OPTIONS)
def test_invalid_options(
    argv: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [LARGE] if argv else []
    assert cli.main(["plan", *files, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "usage:" not in err
    error, _, rest = err.partition("\n")
    assert what in error
    assert fix in rest


@pytest.mark.parametrize("flag", ["--gpu-memory", "--gpu_memory"])
def test_both_spellings_of_the_gpu_memory_option(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in ([flag, "24", LARGE], [LARGE, f"{flag}=24"]):
        assert cli.main(["plan", "--gpus", "1", "--json", *argv]) == 0
        (device,) = json.loads(capsys.readouterr().out)["memory"]
        assert device["usable"] <= 24 * GIB
