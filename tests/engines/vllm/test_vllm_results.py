"""Runs that sample with vLLM learn the context, with an adapter or every weight.

They train on half as many rollouts a step as the shipped experiment, whose targets
tests/driver/test_scoreboard_targets.py checks. Embedded, they close 91% and 92% of the gap.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.vllm import NEEDS_CPU_VLLM, start, steps

from minidistill.errors import EXIT_OK

pytestmark = [*NEEDS_CPU_VLLM, pytest.mark.slow]
WHOLE = (
    "--orchestrator.eval", "--orchestrator.eval.interval", "0",
    "--orchestrator.eval.num_examples", "256", "--orchestrator.teacher_model.eval_baseline",
    "--orchestrator.env.0.args.num_train_examples", "4096",
    "--orchestrator.env.0.args.num_eval_examples", "256",
    "--orchestrator.batch_size", "32", "--trainer.scheduler.warmup_steps", "5",
)  # fmt: skip


PURE = (
    "--trainer.loss.adv_tau", "0", "--trainer.loss.teacher_tau", "1",
    "--trainer.loss.student_tau", "1", "--orchestrator.buffer.skip_verification",
)  # fmt: skip


@pytest.mark.parametrize(
    ("max_steps", "flags"),
    [
        (120, ("--no-trainer.model.lora", "--trainer.optim.lr", "3e-4")),
        (90, ("--schedule", "async", *PURE)),
    ],
    ids=["every weight", "one step ahead, pure"],
)
def test_the_gap_is_closed(tmp_path: Path, max_steps: int, flags: tuple[str, ...]) -> None:
    flags = (*WHOLE, "--max_steps", str(max_steps), *flags)
    run = start(tmp_path / "run", *flags, as_users_do="async" in flags)
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    found = steps(run.path)
    assert len(found) == max_steps
    if "async" in flags:
        assert 0.5 < sum(record["async/staleness"] for record in found) / len(found) <= 1
    else:
        assert max(record["kl/sampler_mismatch"] for record in found) < 1e-8
    board = json.loads((run.path / "scoreboard.json").read_text())
    assert board["baseline_diff"] > 0.8
    assert board["gap_closed_low"] > 0.7
    assert board["teacher_kl_last"] < 0.1 * board["teacher_kl_first"]
    assert board["heldout_kl_after"] < 0.1 * board["heldout_kl_before"]
    # its samples depend on timing, and between samples drift is 0.01 to 1 (docs/results.md)
    assert board["drift_kl"] < (2 if "async" in flags else 0.3)
    assert not run.left_behind()
