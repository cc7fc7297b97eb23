"""Whole runs: the same twice, the same when killed and resumed, and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.other_model import scaled_copy
from support.paths import ROOT
from support.runs import board, command, records, run, start

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE

SCOREBOARD = {
    "env", "baseline_student", "baseline_teacher", "baseline_diff", "student",
    "student_with_context", "gap_closed", "gap_closed_low", "gap_closed_high", "teacher_kl_first",
    "teacher_kl_last", "heldout_kl_before", "heldout_kl_after", "drift_kl", "steps", "seconds",
    "outcome", "verdict", "judged_by", "heldout_kl_closed", "heldout_kl_closed_low",
    "heldout_kl_closed_high", "heldout_kl_prompts", "heldout_kl_negligible", "unrelated_kl_before",
    "unrelated_kl_after", "unrelated_kl_closed", "drift_judged_by", "drift_verdict", "completions",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run(path) == EXIT_OK
    return path


def test_the_run_directory(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.toml", "config.resolved.json", "env.json", "metrics.jsonl", "rollouts",
        "report.html", "logs", "checkpoints", "adapter", "scoreboard.json",
    }  # fmt: skip
    assert {p.name for p in (finished / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["latest", "step_000004", "step_000006"]
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step_000006"
    found = json.loads((finished / "scoreboard.json").read_text())
    assert found.keys() >= SCOREBOARD
    assert found["steps"] == 6


def test_every_metric_of_the_reference_is_there(finished: Path) -> None:
    first, *rest = records(finished)
    assert first["step"] == 0
    assert first.keys() >= {
        "eval/sokoban-env/baseline_student/avg", "eval/sokoban-env/baseline_teacher/avg",
        "eval/sokoban-env/baseline_diff",
    }  # fmt: skip
    steps = [r for r in rest if "teacher_kl" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert record.keys() >= {
            "teacher_kl", "combined_advantage", "loss/policy", "reward/mean", "loss/kl",
            "kl/sampler_mismatch", "entropy/student", "entropy/teacher", "ratio/ess", "optim/lr",
            "optim/grad_norm", "completions/length_mean",
        }  # fmt: skip
        assert record["kl/sampler_mismatch"] < 1e-8
    assert [r["step"] for r in rest if "eval/sokoban-env/student/avg" in r] == [3, 6]


def test_rollouts_on_disk(finished: Path) -> None:
    lines = (finished / "rollouts" / "step_000004.jsonl").read_text().splitlines()
    tensors = load_file(finished / "rollouts" / "step_000004.safetensors")
    offsets = tensors["offsets"].tolist()
    assert len(lines) == 8 == len(offsets) - 1
    for index, line in enumerate(lines):
        rollout = json.loads(line)
        assert next(iter(rollout)) == "schema_version"
        assert rollout["teacher_prompt_text"].replace(rollout["prompt_text"][8:], "") != ""
        assert "world-class" in rollout["teacher_prompt_text"]
        assert "world-class" not in rollout["prompt_text"]
        own = slice(offsets[index], offsets[index + 1])
        gap = (tensors["student_logprobs"] - tensors["teacher_logprobs"])[own]
        assert rollout["mean_logprob_gap"] == pytest.approx(float(gap.mean()), abs=1e-5)
        assert rollout["worst_logprob_gap"] == pytest.approx(float(gap.max()), abs=1e-5)
        assert len(rollout["tokens"]) == len(gap)
        assert "".join(rollout["tokens"]).startswith(rollout["completion"])


def test_a_packed_run_is_the_padded_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to rounding, and the header says which of them it is."""
    assert run(tmp_path / "packed", "--model.attn", "varlen") == EXIT_OK
    assert "varlen, sequences are packed, prompts computed once" in capsys.readouterr().out
    packed, padded = records(tmp_path / "packed"), records(finished)
    assert len(packed) == len(padded)
    for ours, theirs in zip(packed, padded, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("teacher_kl", "loss/total", "optim/grad_norm", "reward/mean"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    finished: Path, tmp_path: Path
) -> None:
    assert run(tmp_path / "again") == EXIT_OK
    assert records(tmp_path / "again") == records(finished)
    assert board(tmp_path / "again") == board(finished)
    assert run(tmp_path / "other", "--seed", "1", "--max_steps", "1") == EXIT_OK
    assert records(tmp_path / "other")[1] != records(finished)[1]


ESTIMATORS = ("full", "sampled", "top_k")
ONE_STEP = (
    "--max_steps", "1", "--orchestrator.batch_size", "4", "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline", "--trainer.loss.top_k", "5",
    "--trainer.loss.estimator",
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each estimator, from one process that interprets the kernels."""
    folder = tmp_path_factory.mktemp("interpreted")
    runs = [command(folder / name, *ONE_STEP, name)[3:] for name in ESTIMATORS]
    code = "import json, sys; from minidistill.cli import main; "
    code += "sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "MINIDISTILL_KERNELS": "interpret"},
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_interpreted_kernels_give_the_same_run(
    interpreted: Path, tmp_path: Path, estimator: str
) -> None:
    """The Triton kernels, interpreted, in place of their twins in torch: same metrics."""
    assert run(tmp_path / "torch", *ONE_STEP, estimator) == EXIT_OK
    ours, twins = records(interpreted / estimator), records(tmp_path / "torch")
    assert [r["step"] for r in ours] == [1]
    for one, other in zip(ours, twins, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def kill_when(path: Path, step: int, tail: float = 0.0) -> None:
    """Start a run and SIGKILL it once a step is in its metrics, `tail` seconds later."""
    process = start(path)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        written = path / "metrics.jsonl"
        if written.exists() and f'"step": {step},' in written.read_text():
            break
        time.sleep(0.002)
    time.sleep(tail)
    process.kill()
    process.wait()
    assert not (path / "scoreboard.json").exists(), "the run had ended before it was killed"


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_killed_and_resumed_is_the_uninterrupted_run(
    finished: Path, tmp_path: Path, step: int
) -> None:
    path = tmp_path / "killed"
    kill_when(path, step, random.random() * 0.1)
    assert run(path, "--resume") == EXIT_OK
    assert records(path) == records(finished)
    assert board(path) == board(finished)
    for name in ("step_000003", "step_000006"):
        ours, whole = (p / "rollouts" / f"{name}.jsonl" for p in (path, finished))
        assert ours.read_bytes() == whole.read_bytes()
    name = "adapter/adapter_model.safetensors"
    ours, whole = load_file(path / name), load_file(finished / name)
    assert all((ours[name] == whole[name]).all() for name in whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(finished, path)
    (path / "scoreboard.json").unlink()
    state = path / "checkpoints" / "step_000006" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-9] ^= 1
    state.write_bytes(data)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "half a li')
    assert run(path, "--resume") == EXIT_OK
    assert "step_000006 is damaged (state.safetensors" in capsys.readouterr().out
    assert records(path) == records(finished)
    assert board(path) == board(finished)
    for checkpoint in (path / "checkpoints").glob("step_*"):
        (checkpoint / "state.json").unlink()
    (path / "scoreboard.json").unlink()
    assert run(path, "--resume") == EXIT_ENVIRONMENT
    assert "every checkpoint" in capsys.readouterr().err


def test_resuming_a_finished_run_shows_its_scoreboard(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished, "--resume") == EXIT_OK
    assert "teacher KL" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_step_and_resumes(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "stopped"
    process = start(path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == EXIT_INTERRUPTED, rest
    assert "--resume continues from here" in rest
    assert not (path / "scoreboard.json").exists()
    assert run(path, "--resume") == EXIT_OK
    assert records(path) == records(finished)


def test_resuming_with_other_settings_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "changed"
    shutil.copytree(finished, path)
    (path / "scoreboard.json").unlink()
    assert run(path, "--resume", "--trainer.optim.lr", "0.5") == EXIT_USAGE
    error = capsys.readouterr().err
    assert "trainer.optim.lr (was 0.002, now 0.5)" in error


def test_a_directory_that_holds_a_run_is_not_written_over(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished) == EXIT_USAGE
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_file_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    """A folder is in its place for a while; mended, the run goes on."""
    path = tmp_path / "full"
    shutil.copytree(finished, path)
    (path / "scoreboard.json").unlink()
    shutil.rmtree(path / "checkpoints" / "step_000006")
    obstacle = path / "rollouts" / "step_000005.jsonl"
    obstacle.unlink()
    (obstacle / "folder").mkdir(parents=True)
    assert run(path, "--resume") == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert f"cannot write {obstacle}" in error
    assert "--resume" in error
    shutil.rmtree(obstacle)
    assert run(path, "--resume") == EXIT_OK
    assert records(path) == records(finished)


def test_a_loss_that_is_no_number_is_a_health_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--trainer.optim.lr", "1e30", "--trainer.scheduler.warmup_steps", "0")
    assert run(tmp_path / "nan", *flags) == EXIT_HEALTH
    assert "logits are not finite" in capsys.readouterr().err
    assert not (tmp_path / "nan" / "scoreboard.json").exists()


def test_the_baseline_student_is_the_student_if_the_teacher_is_another_model(
    tmp_path: Path,
) -> None:
    """Nothing is trained, so both evaluations sample the same completions."""
    scaled_copy(tmp_path / "other", 1.1)
    flags = ("--max_steps", "1", "--trainer.optim.lr", "1e-30", "--teacher_inference.model.name")
    assert run(tmp_path / "run", *flags, str(tmp_path / "other")) == EXIT_OK
    found = board(tmp_path / "run")
    assert found["length_before"] == found["length_after"]
    assert found["baseline_student"] == found["student"]
