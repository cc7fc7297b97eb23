"""Whole runs that sample with vLLM: right on every step, nothing left behind however they end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from support.vllm import NEEDS_CPU_VLLM, SHORT, SOKOBAN, start, steps

from minidistill import cli
from minidistill.driver import build
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.errors import EXIT_HEALTH, EXIT_INTERRUPTED, EXIT_OK

pytestmark = NEEDS_CPU_VLLM


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("vllm") / "whole")
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    assert re.search(r"engine +vLLM", text)
    assert not run.left_behind()
    return run.path


def test_every_sync_took(finished: Path) -> None:
    found = steps(finished)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert all(record["kl/sampler_mismatch"] < 1e-8 for record in found)
    for process in ("trainer", "engine"):
        assert all(0 < record[f"perf/peak_memory_gib/{process}"] < 64 for record in found)


SFT = (
    "--trainer.loss.estimator", "sft", "--trainer.loss.adv_tau", "0",
    "--trainer.loss.student_tau", "0",
)  # fmt: skip
LIVE = ("--orchestrator.teacher_model.update", "live")


@pytest.mark.parametrize(
    ("flags", "scorer"), [((), "trainer"), ((*SFT, *LIVE, "--schedule", "async"), "engine")]
)
def test_the_teacher_samples(tmp_path: Path, flags: tuple[str, ...], scorer: str) -> None:
    """Its answers are right, which the student's are not without the context."""
    run = start(tmp_path / "run", "--orchestrator.sample_from", "teacher", *flags)
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    assert f"scored in the {scorer}" in text
    found = steps(run.path)
    assert len(found) == 5
    assert all(record["reward/mean"] > 0.5 for record in found)
    assert found[0]["kl/forward"] > 0.5
    for record in found:
        if scorer == "trainer":
            assert 0 <= record["kl/sampler_mismatch"] < 1e-8
            assert "perf/overlap" in record, "training began while others were sampled"
        else:
            assert record["teacher_kl"] == pytest.approx(record["kl/forward"], rel=1e-5)
            assert "perf/teacher_repeat_frac" not in record, "nothing was scored"


def test_steps_in_parts_have_the_results_of_whole_ones(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to float error, which AdamW amplifies."""
    monkeypatch.setattr(build, "STREAMED_TOKENS", 100)  # four parts instead of one
    path = tmp_path / "parts"
    assert cli.main(["run", SOKOBAN, *SHORT, "--output_dir", str(path)]) == EXIT_OK
    for parts, whole in zip(steps(path), steps(finished), strict=True):
        assert 0 <= parts["perf/overlap"] <= 1
        assert parts.keys() == whole.keys()
        for key in whole:
            if not key.startswith(("time/", "perf/")):
                assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key


def test_a_stale_adapter_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second update on the engine keeps what it has."""
    sync, engines = VllmEngine.sync, []

    def stale(self: VllmEngine, version: int) -> None:
        engines.append(self)
        if version < 2:
            sync(self, version)

    monkeypatch.setattr(VllmEngine, "sync", stale)
    argv = ["run", SOKOBAN, *SHORT, "--output_dir", str(tmp_path / "stale")]
    assert cli.main(argv) == EXIT_HEALTH
    error = capsys.readouterr().err
    assert "step 3: kl/sampler_mismatch" in error
    assert "stale weights" in error
    assert len(steps(tmp_path / "stale")) == 2
    assert engines[0].process.exit_report()[0] == -signal.SIGKILL


def test_vllm_killed_in_mid_run_is_started_again(finished: Path, tmp_path: Path) -> None:
    run = start(tmp_path / "killed")
    run.until("step 2/")
    os.kill(run.engine(), signal.SIGKILL)
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    assert "restarted with the current weights" in text
    assert not run.left_behind()
    for ours, whole in zip(steps(run.path), steps(finished), strict=True):
        assert ours["kl/sampler_mismatch"] < 1e-8
        assert ours["teacher_kl"] == pytest.approx(whole["teacher_kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_INTERRUPTED),  # and SIGINT: tests/driver/test_run.py
        (signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGKILL"],
)
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = start(tmp_path / "stopped", "--max_steps", "400")
    run.until("step 1/")
    assert "engines.vllm.worker" in " ".join(run.alive().values())
    run.process.send_signal(number)
    text = run.rest()
    assert run.process.wait() == code, text
    assert not run.left_behind()
