"""Out of memory in a micro-batch: the step is repeated with smaller ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, make_lab

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.trainer import trainer as trainer_module

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
ERRORS = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: RuntimeError(CPU_MESSAGE),
    "Python": MemoryError,
}
Configure = Callable[..., Any]


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, rows: int, error: Callable[[], Any], passes: int = 2
) -> None:
    """After `passes` forward passes, a pass of more than `rows` sequences, or of more segments of a
    row with shared prompts, raises `error`."""
    original, calls = trainer_module.hidden_states, []

    def limited(policy: Any, tokens: Any, *states: Any) -> torch.Tensor:
        calls.append(tokens)
        size = len(tokens.segments) or tokens.ids_BL.shape[0]
        if len(calls) > passes and size > rows:
            raise error()
        return original(policy, tokens, *states)

    monkeypatch.setattr(trainer_module, "hidden_states", limited)


@pytest.mark.parametrize("layout", [(), ("--no-trainer.packing",)], ids=["shared", "padded"])
@pytest.mark.parametrize("kind", ERRORS)
def test_the_step_is_repeated_with_the_same_result(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    layout: tuple[str, ...],
) -> None:
    flags = (*SMALL_STEP, "--trainer.micro_batch_tokens", "600", *layout)
    plain, lab = (make_lab(configure(*flags)) for _ in range(2))
    progress: list[int] = []
    expected = plain.trainer.step(plain.rollouts, 1, lambda count: None)
    rows, passes = (2, 2) if layout else (4, 0)
    limit_memory(monkeypatch, rows, ERRORS[kind], passes)
    lab.rollouts = plain.rollouts
    result = lab.trainer.step(lab.rollouts, 1, progress.append)
    assert result.metrics["loss/total"] == pytest.approx(expected.metrics["loss/total"], rel=1e-5)
    assert result.metrics["optim/grad_norm"] == pytest.approx(
        expected.metrics["optim/grad_norm"], rel=1e-4
    )
    for (name, ours), (_, theirs) in zip(
        lab.policy.parameters, plain.policy.parameters, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(progress) == sum(len(r.completion.token_ids) for r in lab.rollouts)
    assert lab.trainer.micro_batches.budget < 600
    budget, warnings = lab.trainer.micro_batches.budget, len(caplog.messages)
    assert f"trainer.micro_batch_tokens is {budget}" in caplog.messages[-1]
    lab.trainer.max_mismatch = float("inf")
    lab.trainer.step(lab.rollouts, 2, lambda count: None)
    assert (lab.trainer.micro_batches.budget, len(caplog.messages)) == (budget, warnings), (
        "the new size is kept"
    )


def test_a_budget_far_above_the_step_falls_below_it_at_once(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lab = make_lab(configure(*SMALL_STEP, "--trainer.micro_batch_tokens", "1000000"))
    limit_memory(monkeypatch, 8, ERRORS["CUDA"], passes=1)
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    lab.trainer.max_mismatch = float("inf")
    lab.trainer.step(lab.rollouts, 2, lambda count: None)
    assert len(caplog.messages) == 1


def test_a_sequence_that_does_not_fit_ends_the_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(configure(*SMALL_STEP))
    before = [parameter.clone() for _, parameter in lab.policy.parameters]
    limit_memory(monkeypatch, 0, ERRORS["CUDA"], passes=1)
    with pytest.raises(UserError, match="one sequence of") as caught:
        lab.trainer.step(lab.rollouts, 1, lambda count: None)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, lab.policy.parameters, strict=True))


def test_other_errors_do_not_repeat_the_step(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lab = make_lab(configure(*SMALL_STEP))
    limit_memory(monkeypatch, 0, lambda: RuntimeError("shapes do not match"), passes=0)
    with pytest.raises(RuntimeError, match="shape"):
        lab.trainer.step(lab.rollouts, 1, lambda count: None)
    assert not caplog.messages
