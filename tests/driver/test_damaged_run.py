"""Runs that lost records: repeated from a checkpoint that agrees, or refused with what is gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import board, records, run

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK

BRIEF = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
BRIEF += ("--max_steps", "4", "--orchestrator.batch_size", "4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run(path, *BRIEF) == EXIT_OK
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def rollouts(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "rollouts").iterdir()}


def cut_off(path: Path) -> None:
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])


def fill_with_zeros(path: Path) -> None:
    file = path / "rollouts" / "step_000003.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_off, "metrics.jsonl has 3 of 4 lines"),
        (fill_with_zeros, "rollouts/step_000003.safetensors is damaged"),
    ],
)
def test_what_was_lost_after_an_older_checkpoint_is_repeated(
    whole: Path,
    path: Path,
    damage: Callable[[Path], None],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(path)
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    output = capsys.readouterr().out
    assert f"step_000004 is damaged ({problem}): using the one before" in output
    assert "resuming after step 2" in output
    assert records(path) == records(whole)
    assert rollouts(path) == rollouts(whole)
    assert board(path) == board(whole)
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    assert "already finished" in capsys.readouterr().out


def test_what_no_checkpoint_agrees_with_is_refused_until_it_is_back(
    whole: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path / "scoreboard.json").unlink()
    for file in (path / "rollouts").glob("step_000001.*"):
        file.unlink()
    before = (path / "metrics.jsonl").read_bytes()
    assert run(path, *BRIEF, "--resume") == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert "every checkpoint" in error
    assert "rollouts/step_000001.jsonl is missing (and 1 more) and rollouts/removed.txt" in error
    assert (path / "metrics.jsonl").read_bytes() == before
    (path / "rollouts" / "removed.txt").write_text("step_000001.*\n")
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    assert "2 files of rollouts are gone" in capsys.readouterr().out
    assert records(path) == records(whole)


def test_a_run_without_its_checkpoints_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(path / "checkpoints")
    (path / "adapter" / "adapter_model.safetensors").unlink()
    before = (path / "metrics.jsonl").read_bytes()
    assert run(path, *BRIEF, "--resume") == EXIT_ENVIRONMENT
    captured = capsys.readouterr()
    assert "adapter_model.safetensors is missing: the run's end is repeated" in captured.out
    assert "has no checkpoint, but metrics.jsonl has 4 steps" in captured.err
    assert (path / "metrics.jsonl").read_bytes() == before
