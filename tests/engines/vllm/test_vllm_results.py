"""Runs that sample with vLLM reach what embedded ones do, with an adapter or every weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import assert_gap_closed
from support.vllm import NEEDS_CPU_VLLM, start, steps

from minidistill.errors import EXIT_OK

pytestmark = [*NEEDS_CPU_VLLM, pytest.mark.slow]
WHOLE = (
    "--orchestrator.eval", "--orchestrator.eval.interval", "0",
    "--orchestrator.eval.num_examples", "256", "--orchestrator.teacher_model.eval_baseline",
    "--orchestrator.env.0.args.num_train_examples", "4096",
    "--orchestrator.env.0.args.num_eval_examples", "256",
    "--orchestrator.batch_size", "64", "--trainer.scheduler.warmup_steps", "10",
)  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_steps", "80"),
        ("--max_steps", "100", "--no-trainer.model.lora", "--trainer.optim.lr", "3e-4"),
        ("--max_steps", "100", "--schedule", "async"),
    ],
    ids=["adapter", "every weight", "one step ahead"],
)
def test_the_gap_is_closed(tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = start(tmp_path / "run", *WHOLE, *flags)
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    found = steps(run.path)
    assert len(found) == int(flags[1])
    if "async" in flags:
        assert 0.5 < sum(record["async/staleness"] for record in found) / len(found) <= 1
    else:
        assert max(record["kl/sampler_mismatch"] for record in found) < 1e-8
    board = json.loads((run.path / "scoreboard.json").read_text())
    assert board["baseline_diff"] > 0.8
    assert_gap_closed(board)
    assert board["drift_kl"] < 0.3
    assert not run.left_behind()
