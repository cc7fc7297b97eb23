"""Runs that a guard stops: what they say, what is saved, and how they go on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.runs import records, run

from minidistill.driver import probes
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.errors import EXIT_HEALTH, EXIT_OK

BRIEF = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
# Rewards alone, all of which are 0: advantages and the gradient are 0
NOTHING_TO_LEARN = (
    *BRIEF, "--max_steps", "4", "--ckpt.interval", "0", "--health.patience", "3",
    "--trainer.loss.adv_tau", "1", "--trainer.loss.teacher_tau", "0",
    "--trainer.loss.student_tau", "0", "--orchestrator.env.0.id", "support.equal_rewards:load",
)  # fmt: skip


def spoiled(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    """Add to the log-probs that the sampler reports in training, not to those of probes."""
    generate = EmbeddedEngine.generate

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        completions = generate(self, *args, **kwargs)
        if args[1].max_tokens == probes.TOKENS:
            return completions
        return [replace(c, logprobs=tuple(p + shift for p in c.logprobs)) for c in completions]

    monkeypatch.setattr(EmbeddedEngine, "generate", shifted)


@pytest.mark.parametrize(
    ("shift", "says"),
    [
        (-5.0, "step 1: every token was masked"),  # the ratio is e^5, and the bound is 8
        (math.nan, "the embedded on cpu, sharing the trainer's weights returned"),
    ],
)
def test_a_step_that_cannot_be_trained_on_stops_the_run(
    shift: float,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoiled(monkeypatch, shift)
    limits = ("--trainer.loss.max_sampler_mismatch", "off")
    assert run(tmp_path / "run", *BRIEF, *limits) == EXIT_HEALTH
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_guard_stops_the_run_with_a_checkpoint_and_a_resume_goes_past_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = tmp_path / "run", tmp_path / "whole"
    assert run(path, *NOTHING_TO_LEARN) == EXIT_HEALTH
    captured = capsys.readouterr()
    assert "step 3: the gradient is 0, and the KL to the teacher is" in captured.err
    assert f"read {path}/rollouts/step_000003.jsonl" in captured.err
    assert "The checkpoint of step 3 is saved" in captured.err
    assert captured.out.count("warning: step 3: the rewards of each group are equal") == 1
    assert (path / "rollouts" / "step_000003.jsonl").exists()
    assert [c.name for c in (path / "checkpoints").glob("step_*")] == ["step_000003"]
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(s["optim/grad_norm"], s["advantage/zero_frac"]) for s in steps] == [(0.0, 1.0)] * 3

    warn = ("--health.no_gradient", "warn")
    assert run(path, *NOTHING_TO_LEARN, *warn, "--resume") == EXIT_OK
    assert "in a row" not in capsys.readouterr().out  # all was said before
    assert run(whole, *NOTHING_TO_LEARN, "--health.no_gradient", "off") == EXIT_OK
    assert records(path) == records(whole)
    assert (path / "adapter" / "adapter_model.safetensors").exists()
