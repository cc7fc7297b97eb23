"""vLLM runs the model for a few tokens before anything is written. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minidistill.engines.vllm.client import EngineFailed
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import Options
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.types import Role

SAMPLED = (-1.0, -2.0)


class Trainer:
    """Scores as the fake process samples, but for `error` nats."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def score(self, prompts: Any, completions: Any, role: Role, temperature: float) -> Any:
        assert role is Role.BASE
        return [[SAMPLED[i % 2] + self.error for i in range(len(completions[0]))]]


def engine_with(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], error: str = "", *, sleeps: bool = False
) -> VllmEngine:
    """An engine whose process records calls, or fails in those that run the model."""

    def call(method: str, take: Any = None, **arguments: Any) -> Any:
        calls.append(method)
        if method in ("generate", "score") and error:
            raise EngineFailed(error)
        if method == "generate":
            assert arguments["adapter"] is None, "the base, before the first sync"
            take((1, [(0, ((5, 6), SAMPLED, "length"), None, False)]))
        if method == "score":
            (completion,) = arguments["completions"]
            return [torch.tensor([[SAMPLED[i % 2]] for i in range(len(completion))]).numpy()], 0
        return None

    process: Any = SimpleNamespace(wait_until_started=lambda: None, call=call, close=lambda: None)
    monkeypatch.setattr("minidistill.engines.vllm.engine.EngineProcess", lambda *args: process)
    arguments = {"tensor_parallel_size": 1, "max_num_seqs": 1}
    engine = VllmEngine(Options(arguments, {}, {}, (), "0.32.0", sleeps), max_restarts=0)
    policy: Any = SimpleNamespace(
        lora=True, dtype=torch.float32, eos_ids=frozenset(), free_cached_memory=lambda: None
    )
    sender: Any = SimpleNamespace(policy=policy, version=None, send=lambda receivers: {})
    engine.sender = sender
    engine.wait_until_ready()
    return engine


TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, None], ids=["samples", "only scores"])


@TEMPERATURES
def test_a_model_that_vllm_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, temperature: float | None
) -> None:
    engine = engine_with(monkeypatch, [], "AssertionError: the kernel requires BF16.")
    with pytest.raises(UserError) as caught:
        engine.verify(Trainer(), temperature)  # type: ignore[arg-type]
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert caught.value.what == (
        "vLLM cannot run this model on the CPU: vLLM: AssertionError: the kernel requires BF16."
    )
    assert 'inference.engine = "embedded"' in caught.value.fix


@TEMPERATURES
@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_model_that_vllm_computes_differently_is_refused(
    monkeypatch: pytest.MonkeyPatch, temperature: float | None, error: float
) -> None:
    engine = engine_with(monkeypatch, [])
    engine.verify(Trainer(1e-4), temperature)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="log-probs differ from transformers'") as caught:
        engine.verify(Trainer(error), temperature)  # type: ignore[arg-type]
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_an_engine_that_slept_sleeps_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    engine = engine_with(monkeypatch, calls, sleeps=True)
    engine.sleep()
    engine.verify(Trainer(), 1.0)  # type: ignore[arg-type]
    engine.verify(Trainer(), None)  # type: ignore[arg-type]
    assert calls == ["sleep", "wake", "generate", "sleep", "wake", "score", "sleep"]
