"""Out of memory outside a training step: passes are halved, or the run ends with advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, Lab, make_lab
from support.runs import run

from minidistill.driver import build, model_checks, session
from minidistill.engines import embedded
from minidistill.engines.vllm.client import EngineFailed, RestartingProcess
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, UserError
from minidistill.evaluation.evaluator import Evaluator
from minidistill.rollouts.collector import Collector
from minidistill.trainer import checkpoint, token_kl
from minidistill.trainer.guards import is_out_of_memory
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Request, Role, SamplingParams

Configure = Callable[..., Any]
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
MESSAGES = {
    CUDA: True,
    "CUDA error: out of memory\nCUDA kernel errors might be reported later": True,
    "CUDA driver error: cudaErrorMemoryAllocation": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
    "could not create a primitive": True,
    "could not create a primitive descriptor for the matmul primitive": False,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": True,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, …)`": False,
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": True,
    "NCCL error … Last error:\nCuda failure 2 'out of memory'": True,
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory": True,
    "CUDA error: an illegal memory access was encountered": False,
    "shapes do not match": False,
}


@pytest.fixture
def lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL_STEP, "--no-trainer.packing"), trained=False)


@pytest.mark.parametrize("message", MESSAGES)
def test_which_errors_are_out_of_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message)) == MESSAGES[message]


def test_other_out_of_memory_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("of any kind"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(UserError("out of memory, and explained already"))


def limit_rows(module: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`hidden_states` in this module fails for more than `most` sequences. Returns its calls."""
    original, calls = module.hidden_states, []

    def limited(policy: Any, tokens: Any, *states: Any) -> torch.Tensor:
        rows = tokens.ids_BL.shape[0]
        calls.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError(CUDA)
        return original(policy, tokens, *states)

    monkeypatch.setattr(module, "hidden_states", limited)
    return calls


def kl(lab: Lab, budget: TokenBudget) -> torch.Tensor:
    prompts = [r.prompt for r in lab.rollouts]
    views = [p.student_ids for p in prompts], [p.teacher_ids for p in prompts]
    return token_kl.token_kl(
        lab.policy,
        [r.completion.token_ids for r in lab.rollouts],
        prompts=views,
        roles=(Role.STUDENT, Role.TEACHER),
        temperature=1.0,
        budget=budget,
        doing="testing",
    )


def test_the_kl_is_computed_in_halves(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = kl(lab, TokenBudget(1 << 20))
    budget = TokenBudget(1 << 20)
    calls = limit_rows(token_kl, 4, monkeypatch)
    torch.testing.assert_close(kl(lab, budget), expected, rtol=1e-4, atol=1e-6)
    assert calls[:2] == [12, 6]
    assert sum(rows for rows in calls if rows <= 4) == 24, "each role reads each sequence once"
    assert len(caplog.messages) == 2
    assert f"while testing ({CUDA}): {budget.tokens} tokens at a time" in caplog.messages[-1]
    calls.clear()
    kl(lab, budget)
    assert max(calls) <= 4, "the smaller budget is kept"
    assert len(caplog.messages) == 2


def test_a_sequence_whose_kl_does_not_fit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_rows(token_kl, 0, monkeypatch)
    with pytest.raises(UserError, match="out of memory while testing, with one sequence") as caught:
        kl(lab, TokenBudget(1 << 20))
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "max_tokens" in caught.value.fix


def test_preflight_in_halves_and_with_few_logits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = []
    lab.policy.causal.register_forward_hook(lambda m, a, out: shapes.append(out.logits.shape))
    prompts = [r.prompt for r in lab.rollouts[::3]]
    limit_rows(model_checks, 2, monkeypatch)
    budget = TokenBudget(1 << 20)
    assert model_checks.check_model(lab.policy, prompts, budget) is True
    assert {shape[0] for shape in shapes} == {1}
    asked = [shape[1] for shape in shapes if shape[1] <= 7]
    assert len(asked) >= len(prompts) + 8, "6 tokens and one more, of checked and of sampled ones"
    assert len(shapes) - len(asked) == 2, "of attention, whole prompts"
    assert budget.tokens < 1000
    assert all("out of memory while checking the model" in m for m in caplog.messages)


def test_the_embedded_engine_decodes_and_scores_in_halves(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [Request(r.prompt.student_ids, 7 + i) for i, r in enumerate(lab.rollouts)]
    params = SamplingParams(6, 1.0)
    expected = lab.engine.generate(requests, params, Role.STUDENT)
    original, failures = lab.engine._forward, []

    def limited(ids: torch.Tensor, mask: Any, positions: Any, cache: Any) -> torch.Tensor:
        if ids.shape[1] == 1 and ids.shape[0] > 5 and cache.get_seq_length() % 3 == 0:
            failures.append(ids.shape[0])  # in the middle of decoding
            raise torch.OutOfMemoryError(CUDA)
        return original(ids, mask, positions, cache)

    monkeypatch.setattr(lab.engine, "_forward", limited)
    progress: list[int] = []
    sampled = lab.engine.generate(requests, params, Role.STUDENT, progress.append)
    assert failures
    for ours, theirs in zip(sampled, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert sum(progress) == len(requests), "no completion is counted twice"
    assert all("while sampling with the trainer's model" in m for m in caplog.messages)
    views = [r.prompt_ids for r in requests], [c.token_ids for c in expected]
    scores = lab.engine.score(*views, Role.STUDENT)
    limit_rows(embedded, 5, monkeypatch)
    for row, reference in zip(lab.engine.score(*views, Role.STUDENT), scores, strict=True):
        assert row == pytest.approx(reference, abs=1e-5)


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(CUDA)


PLACES: dict[str, tuple[Any, str]] = {
    "loading the model": (build, "load_policy"),
    "checking the model before training": (model_checks, "collate"),
    "preparing the optimizer": (build, "build_trainer"),
    "sampling": (Collector, "collect"),
    "updating the weights": (torch.optim.AdamW, "step"),
    "evaluating": (Evaluator, "_sample"),
    "saving a checkpoint": (checkpoint, "save_file"),
}
BRIEF = ("--max_steps", "2", "--ckpt.interval", "1", "--orchestrator.eval.interval", "1")
NO_BASELINE = ("--no-orchestrator.teacher_model.eval_baseline",)


@pytest.mark.parametrize("doing", PLACES)
def test_the_run_ends_with_what_was_done_and_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], doing: str
) -> None:
    monkeypatch.setattr(*PLACES[doing], out_of_memory)
    assert run(tmp_path / "run", *BRIEF, *NO_BASELINE) == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert error.startswith(f"error: out of memory while {doing}")
    assert f": {CUDA}\n" in error
    assert "fix: " in error
    assert "`minidistill plan` shows what needs memory" in error
    assert "Traceback" not in error


def test_the_run_ends_with_advice_wherever_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "write_rollouts", out_of_memory)
    assert run(tmp_path / "run", *BRIEF, *NO_BASELINE) == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert error.startswith(f"error: out of memory: {CUDA}")
    assert "micro_batch_tokens" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("message", "ready", "code", "fix"),
    [
        (f"OutOfMemoryError: {CUDA}", True, EXIT_ENVIRONMENT, "gpu_memory_utilization"),
        ("ValueError: No available memory for the cache blocks. Try …", False, EXIT_ENVIRONMENT,
         "gpu_memory_utilization"),
        ("ValueError: shapes do not match", True, EXIT_FAILED, "embedded"),
    ],
)  # fmt: skip
def test_what_vllm_reports(message: str, ready: bool, code: int, fix: str) -> None:
    def fail() -> Any:
        raise EngineFailed(message)

    process: Any = SimpleNamespace(wait_until_started=lambda: None if ready else fail())
    restarting = RestartingProcess(lambda: process, lambda: None, max_restarts=0)
    with pytest.raises(UserError, match=message[:20]) as caught:
        restarting.call(fail)
    assert caught.value.exit_code == code
    assert fix in caught.value.fix
