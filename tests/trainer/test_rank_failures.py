"""A rank that is killed or fails: one error, no hang, no process left behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes
from support.paths import SOKOBAN, TESTS
from support.processes import wait_for
from support.ranks import NO_EVALUATION, SMALL, TWO_RANKS, ranked_lab
from support.runs import TINY, run, start

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_INTERRUPTED
from minidistill.system.foreign import Interrupted
from minidistill.system.scratch import sweep
from minidistill.trainer.distributed import launcher
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.step import StepRollouts
from minidistill.types import Rollout


def rank_pids(mark: str, module: str = launcher.MODULE) -> list[int]:
    """The process ids of the ranks of the run with a mark."""
    return [pid for pid, command in processes.marked(mark).items() if module in command]


@pytest.mark.parametrize(
    ("target", "signal_number", "code"),
    [
        ("rank", signal.SIGKILL, EXIT_FAILED),
        ("driver", signal.SIGKILL, -signal.SIGKILL),
        ("driver", signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_killing_a_process_ends_the_run_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, signal_number: int, code: int
) -> None:
    """Nor a temporary folder, once another run has started."""
    path, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    world_size = 3 if target == "rank" else 2
    flags = ("--max_steps", "400", "--orchestrator.batch_size", "12", "--trainer.shard")
    mark = processes.new_mark()
    flags = (*NO_EVALUATION, *flags, "--trainer.world_size", str(world_size))
    interrupted = signal_number == signal.SIGINT
    process = start(
        path, *flags, as_users_do=interrupted, TMPDIR=str(temporary), **{processes.MARK: mark}
    )
    metrics = path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and b'"step": 2,' in metrics.read_bytes())
    (folder,) = temporary.glob("minidistill-*")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    sweep()
    assert folder.exists()
    ranks = rank_pids(mark)
    assert len(ranks) == world_size - 1
    os.kill(ranks[0] if target == "rank" else process.pid, signal_number)
    found = process.wait(timeout=60)
    assert process.stdout is not None
    output = process.stdout.read()
    assert found == code, output
    assert ("rank 1 of the trainer ended: signal SIGKILL" in output) == (target == "rank")
    assert not processes.left_behind(mark)
    assert folder.exists() == (code == -signal.SIGKILL)
    sweep()
    assert not folder.exists()


def test_a_run_that_is_stopped_while_its_ranks_start_leaves_nothing(tmp_path: Path) -> None:
    """They are importing, which may take a while."""
    path, temporary, stuck = (tmp_path / name for name in ("run", "temporary", "stuck"))
    temporary.mkdir()
    mark = processes.new_mark()
    command = [sys.executable, "-m", "support.stuck_ranks", "run", SOKOBAN, *TINY, *TWO_RANKS]
    variables = {"TMPDIR": str(temporary), "STUCK": str(stuck), processes.MARK: mark}
    process = processes.start([*command, "--output_dir", str(path)], **variables)
    wait_for(stuck.exists)
    assert rank_pids(mark, "support.stuck_import")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_INTERRUPTED
    assert not processes.left_behind(mark)
    assert not list(temporary.glob("minidistill-*"))
    assert not path.exists()


def test_a_close_that_is_interrupted_still_ends_the_ranks(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: RankGroup) -> None:
        raise Interrupted

    mark = processes.new_mark()
    monkeypatch.setenv(processes.MARK, mark)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(RankGroup, "dismiss", interrupt)
    lab = ranked_lab(configure(*SMALL, *TWO_RANKS))
    lab.__enter__()
    assert list(tmp_path.glob("minidistill-*"))
    assert rank_pids(mark)
    with pytest.raises(Interrupted):
        lab.__exit__(None, None, None)
    assert not list(tmp_path.glob("minidistill-*"))
    assert not processes.marked(mark)


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("error", EXIT_FAILED, "exit code 1; last output: ValueError: no such layer"),
        ("memory", EXIT_ENVIRONMENT, "one sequence of"),
    ],
)
def test_an_error_in_a_rank_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(launcher, "MODULE", "support.broken_rank")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    monkeypatch.setenv("FAULT", fault)
    assert (
        run(tmp_path / "run", *TWO_RANKS, *NO_EVALUATION, "--trainer.micro_batch_tokens", "9")
        == code
    )
    error = capfd.readouterr().err
    assert "rank 1 of the trainer ended" in error
    assert message in error
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("point", "phase", "key"),
    [
        ("start", "starting", "load"),
        ("load", "loading the model", "load"),
        ("step", "in a command of rank 0", "step"),
    ],
)
def test_a_rank_that_stops_ends_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    point: str,
    phase: str,
    key: str,
) -> None:
    monkeypatch.setattr(launcher, "MODULE", "support.stopped_rank")
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("STOP", point)
    limits = {"load": 60.0, "step": 60.0, key: 1.0}
    flags = [text for name, value in limits.items() for text in (f"--silence.{name}", str(value))]
    flags += ["--trainer.shard"] if point == "step" else []
    path = tmp_path / "run"
    assert run(path, *TWO_RANKS, *NO_EVALUATION, *flags) == EXIT_ENVIRONMENT
    error = capfd.readouterr().err
    assert f"rank 1 of the trainer was silent for 1 s ({phase}), and was given up" in error
    assert f"stopped by a signal; last output: stopping at {point}" in error
    assert f"where: silence.{key}" in error
    if point == "step":
        assert f"  | stopping at {point}" in (path / "logs" / "run.log").read_text()
    assert not torch.distributed.is_initialized()


def test_ranks_that_wait_for_rollouts_are_not_silent(configure: Callable[..., Any]) -> None:
    """The driver waits for an engine, which may take longer than a step of the trainer may."""
    with ranked_lab(configure(*SMALL, *TWO_RANKS, "--silence.step", "1.0")) as lab:
        rollouts = StepRollouts.of(lab.rollouts)

        def parts() -> Iterator[Sequence[Rollout]]:
            yield lab.rollouts[:4]
            time.sleep(1.5)
            yield lab.rollouts[4:]

        streamed = replace(rollouts, parts=parts())
        result = lab.trainer.stream_step(streamed, 1, lambda count: None)
        assert len(result.rollouts) == len(lab.rollouts)
