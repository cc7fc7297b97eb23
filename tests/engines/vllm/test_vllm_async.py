"""Weights that change in the middle of completions, replicas, and runs one step ahead."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm import (
    NEEDS_CPU_VLLM,
    Bench,
    assert_token_versions_match_metrics,
    start,
    steps,
)

from minidistill.engines.vllm.engine import VllmEngine, VllmReplicas
from minidistill.engines.vllm.weights_buffer import SendBuffer
from minidistill.errors import EXIT_OK
from minidistill.types import Request, Role, SamplingParams

pytestmark = NEEDS_CPU_VLLM
FEW = ("--orchestrator.env.0.args.num_train_examples", "8")


def sample_while(bench: Bench, change: Any) -> list[tuple[Request, Any]]:
    """Completions that were at hand when `change` was made, once the first had ended."""
    puzzles = bench.puzzles(8)
    asked = [Request(puzzles[i % 8], i) for i in range(1600)]  # six times what is decoded at once
    found: list[Any] = []
    first = threading.Event()

    def generate() -> None:
        found.extend(
            bench.engine.generate(
                asked, SamplingParams(24), Role.STUDENT,
                advance=lambda count: first.set(),
            )
        )  # fmt: skip

    thread = threading.Thread(target=generate)
    thread.start()
    assert first.wait(60)
    change()
    thread.join()
    return [(r, c) for r, c in zip(asked, found, strict=True) if len(c.versions) == 2]


def test_completions_continue_with_a_new_adapter(adapter_bench: Bench) -> None:
    check_completions_continue(adapter_bench)


def test_completions_continue_with_new_weights(weights_bench: Bench) -> None:
    check_completions_continue(weights_bench)


def check_completions_continue(bench: Bench) -> None:
    """Each token's log-prob is that of the version noted for it. All weights: exactly, for keys
    and values are computed again; an adapter: up to the switch, for they are kept."""
    policy, lora = bench.policy, bench.policy.lora
    bench.change(seed=1)
    version = bench.sync()
    before = {n: p.detach().clone() for n, p in policy.parameters}

    def change() -> None:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in policy.parameters:
                if not lora or "lora_B" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    # so much that no token is as likely as before, whichever the switch leaves
                    parameter.add_((0.3 if lora else 0.2) * noise)
        assert bench.sync() == version + 1

    found = sample_while(bench, change)
    after = {n: p.detach().clone() for n, p in policy.parameters}
    found = [(r, c) for r, c in found if 2 <= c.versions[1][0] < len(c.token_ids)][:24]
    assert found, "the weights did not change in the middle of any"
    truth: list[list[list[float]]] = []
    for weights in (before, after):
        with torch.no_grad():
            for name, parameter in policy.parameters:
                parameter.copy_(weights[name])
        truth.append([bench.truth(r.prompt_ids, c.token_ids, Role.STUDENT) for r, c in found])
    gaps = []
    for (_, completion), old, new in zip(found, *truth, strict=True):
        (start, first), (switch, second) = completion.versions
        assert (start, first, second) == (0, version, version + 1)
        rest = len(completion.token_ids) - switch
        assert completion.token_versions(0) == [version] * switch + [version + 1] * rest
        assert completion.logprobs[:switch] == pytest.approx(tuple(old[:switch]), abs=1e-4)
        gaps += [a - b for a, b in zip(completion.logprobs[switch:], old[switch:], strict=True)]
        if not lora:
            expected = tuple(new[switch:])
            assert completion.logprobs[switch:] == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, gaps)) > 1e-2


def keep_in(handed: dict[int, Any]) -> Any:
    return lambda step, ended: handed.update({index: completion for index, completion, _ in ended})


def test_replicas_are_one_engine(adapter_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process gives what the first gives, each has the samples of its own prompts, and
    both take over one copy of the weights. One that dies gets them when it has restarted."""
    one = adapter_bench
    replicas = VllmReplicas([one.engine, VllmEngine(one.engine.options, 1)])
    packed, pack = [], SendBuffer.pack

    def counted(self: SendBuffer, tensors: Any) -> Any:
        packed.append(len(tensors))
        return pack(self, tensors)

    monkeypatch.setattr(SendBuffer, "pack", counted)
    try:
        replicas.attach(one.policy, (Role.STUDENT, Role.TEACHER))
        replicas.sync(next(one.versions))
        replicas.wait_until_ready()
        for seed in (3, 4, 5):
            one.change(seed)
            if seed == 5:
                os.killpg(replicas.replicas[1].process.popen.pid, signal.SIGKILL)
            packed.clear()
            replicas.sync(next(one.versions))
            assert len(packed) == (2 if seed == 5 else 1), "the restarted one has its own"
            puzzles = one.puzzles(5)
            asked = [Request(p, 10 * i + s) for i, p in enumerate(puzzles) for s in range(3)]
            told: list[int] = []
            handed: dict[int, Any] = {}
            how = SamplingParams(8), Role.STUDENT
            expected = one.engine.generate(asked, *how)
            found = replicas.generate(asked, *how, told.append, keep_in(handed))
            assert [handed[i] for i in range(len(asked))] == found
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
            assert sum(told) == len(asked)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            tails = [c.token_ids for c in expected]
            prompts = [r.prompt_ids for r in asked]
            for role in (Role.STUDENT, Role.TEACHER):
                both = [e.score(prompts, tails, role) for e in (one.engine, replicas)]
                for ours, theirs in zip(*both, strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-4)
        assert replicas.replicas[1].restarts == 1
    finally:
        replicas.replicas[1].close()
        one.engine.attach(one.policy, (Role.STUDENT, Role.TEACHER))
        one.sync()


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start(tmp_path_factory.mktemp("async") / "run", "--schedule", "async",
                "--inference.parallel.dp", "2")  # fmt: skip
    text = run.rest()
    assert run.process.wait() == EXIT_OK, text
    assert "2 × vLLM" in text
    assert not run.left_behind()
    return run.path


def test_a_run_one_step_ahead(ahead: Path) -> None:
    found = steps(ahead)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert found[0]["async/staleness"] == 0
    assert found[0]["kl/sampler_mismatch"] < 1e-8
    assert all(0 <= record["async/staleness"] <= 1 for record in found)
    assert all(0 <= record["async/overlap"] <= 1 for record in found)
    assert any(record["async/overlap"] > 0 for record in found[1:])
    assert_token_versions_match_metrics(ahead)
