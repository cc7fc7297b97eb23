"""Several running vLLM servers, teachers' servers, and sampling one step ahead with servers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Started
from support.servers import ADAPTERS, adapters_at, answered_requests, engine_at, serving
from support.vllm import (
    NEEDS_CPU_VLLM,
    SHORT,
    SOKOBAN,
    Bench,
    assert_token_versions_match_metrics,
    policy_of,
    start,
    steps,
)
from test_vllm_teacher import made, truth

from minidistill import cli
from minidistill.config import load_config
from minidistill.engines.replicas import Replicas
from minidistill.engines.server import http as server_http
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.trainer.policy import Weights
from minidistill.types import Request, Role, SamplingParams

pytestmark = NEEDS_CPU_VLLM
LR = ("--trainer.optim.lr", "1e-3")


@pytest.fixture(scope="module")
def second(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Started]]:
    """A server beside the one of all files; the last test here ends it."""
    with serving(tmp_path_factory.mktemp("second") / "log", *ADAPTERS) as found:
        yield found


def bench_of(engine: Any) -> Bench:
    config = load_config([SOKOBAN]).config
    policy = policy_of(config)
    engine.attach(policy, (Role.STUDENT, Role.TEACHER))
    engine.wait_until_ready()
    return Bench(config, policy, engine)


def urls(*found: str) -> str:
    return "[" + ", ".join(f'"{url}"' for url in found) + "]"


def test_two_servers_share_prompts_and_get_every_version(
    url: str, second: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (url, second[0])
    engines = [engine_at(one, tmp_path / "sync") for one in both]
    asked: list[set[tuple[int, ...]]] = []
    for engine in engines:

        def generate(requests: Any, *how: Any, really: Any = engine.generate) -> Any:
            asked.append({request.prompt_ids for request in requests})
            return really(requests, *how)

        monkeypatch.setattr(engine, "generate", generate)
    replicas = Replicas(engines)
    bench = bench_of(replicas)
    try:
        for version in (1, 2):
            asked.clear()
            bench.change(seed=version)
            replicas.sync(version)
            before = [answered_requests(one) for one in both]
            requests = [
                Request(p, 10 * i + s) for i, p in enumerate(bench.puzzles(5)) for s in range(3)
            ]
            found = replicas.generate(requests, SamplingParams(9), Role.STUDENT)
            done = [answered_requests(one) - old for one, old in zip(both, before, strict=True)]
            assert sorted(done) == [6, 9], "three samples of two prompts, and of three"
            assert not asked[0] & asked[1]
            for request, completion in zip(requests, found, strict=True):
                prompt, ids = request.prompt_ids, completion.token_ids
                assert completion.versions == ((0, version),)
                expected = bench.truth(prompt, ids, Role.STUDENT)
                assert completion.logprobs == pytest.approx(expected, abs=1e-4)
            prompts = [r.prompt_ids for r in requests]
            tails = [c.token_ids for c in found]
            for role in (Role.STUDENT, Role.TEACHER):
                rows = replicas.score(prompts, tails, role)
                for prompt, ids, row in zip(prompts, tails, rows, strict=True):
                    assert row == pytest.approx(bench.truth(prompt, ids, role), abs=1e-4)
        assert [len(adapters_at(one)) for one in both] == [1, 1]
    finally:
        replicas.close()
    assert [adapters_at(one) for one in both] == [[], []]
    assert not (tmp_path / "sync").exists()


def test_a_run_on_two_servers(
    url: str, second: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answered_requests(url), answered_requests(second[0])
    flags = [*SHORT[2:], *LR, "--inference.server_urls", urls(url, second[0])]
    assert cli.main(["run", SOKOBAN, *flags, "--output_dir", str(tmp_path / "run")]) == EXIT_OK
    found = steps(tmp_path / "run")
    assert len(found) == 5
    assert all(record["kl/sampler_mismatch"] < 1e-8 for record in found)
    assert "2 × vLLM server on " in capsys.readouterr().out
    assert answered_requests(url) > before[0]
    assert answered_requests(second[0]) > before[1]


@pytest.mark.parametrize(
    ("update", "same"), [("ema", False), ("ema", True), ("live", True), ("frozen", True)]
)
def test_a_teachers_server_scores_with_its_role_of_now(
    update: str, same: bool, url: str, second: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where `same`, one server is given for both."""
    monkeypatch.chdir(tmp_path)  # adapters are left there
    settings = "--orchestrator.teacher_model."
    flags = [f"{settings}update", update, f"{settings}ema_decay", "0.5"]
    flags += ["--inference.server_urls", urls(url)]
    flags += ["--teacher_inference.server_urls", urls(url if same else second[0])]
    with made(*flags, "--trainer.optim.lr", "1e-2") as (trainer, collector, engine):
        policy = trainer.policy
        weights = {"ema": Weights.EMA, "live": Weights.STUDENT, "frozen": Weights.BASE}[update]
        assert policy.teacher_weights is weights
        for step in (1, 2, 3):
            engine.sync(step - 1)
            rollouts, _ = collector.collect(engine, step, step - 1)
            moved = 0.0
            for r in rollouts:
                ids, found = r.completion.token_ids, list(r.teacher.logprobs)
                expected = {}
                for other in Role:
                    with policy.running_as(other):
                        expected[other] = truth(policy.causal, r.prompt.teacher_ids, ids)
                assert found == pytest.approx(expected[Role.TEACHER], abs=1e-4)
                for other in (Role.STUDENT, Role.BASE):
                    if policy.weights_of(other) is weights:
                        continue
                    gaps = zip(found, expected[other], strict=True)
                    moved = max(moved, *(abs(a - b) for a, b in gaps))
                with policy.running_as(Role.STUDENT):
                    own = truth(policy.causal, r.prompt.student_ids, ids)
                assert r.completion.logprobs == pytest.approx(own, abs=1e-4)
            assert moved > 1e-2 or step == 1, "the roles have parted"
            trainer.step(rollouts, step, lambda count: None)
    assert not adapters_at(url)
    assert not any(tmp_path.iterdir())


def test_requests_in_flight_finish_under_the_version_that_they_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_http, "IN_FLIGHT", 8)
    bench = bench_of(engine_at(url, tmp_path / "sync"))
    engine, policy = bench.engine, bench.policy
    puzzles = bench.puzzles(8)
    asked = [Request(puzzles[i % 8], i) for i in range(96)]
    found: list[Any] = []
    done: list[int] = []
    some, synced = threading.Event(), threading.Event()

    def advance(count: int) -> None:
        done.append(count)
        some.set()
        if len(done) == len(asked) // 2:  # the others are sent once there is another version
            synced.wait(60)

    def generate() -> None:
        found.extend(engine.generate(asked, SamplingParams(24), Role.STUDENT, advance=advance))

    try:
        weights = {}
        for version in (1, 2):
            bench.change(seed=version)
            weights[version] = [p.detach().clone() for _, p in policy.parameters]
            if version == 2:
                thread = threading.Thread(target=generate)
                thread.start()
                assert some.wait(60)
            engine.sync(version)
        synced.set()
        thread.join()
        assert {c.versions for c in found} == {((0, 1),), ((0, 2),)}
        with torch.no_grad():
            for request, completion in zip(asked, found, strict=True):
                values = weights[completion.versions[0][1]]
                for (_, parameter), value in zip(policy.parameters, values, strict=True):
                    parameter.copy_(value)
                expected = bench.truth(request.prompt_ids, completion.token_ids, Role.STUDENT)
                assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        (left,) = adapters_at(url)
        assert left.endswith("-v2")
        assert [path.name for path in (tmp_path / "sync").iterdir()] == [left]
    finally:
        engine.close()


def test_what_is_in_flight_at_the_end_is_given_up(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_http, "IN_FLIGHT", 1)
    bench = bench_of(engine_at(url, tmp_path / "sync", max_restarts=2))
    bench.engine.sync(1)
    errors: list[BaseException] = []
    done: list[int] = []
    some = threading.Event()

    def advance(count: int) -> None:
        done.append(count)
        some.set()

    (puzzle,) = bench.puzzles(1)
    requests = [Request(puzzle, i) for i in range(2000)]

    def generate() -> None:
        try:
            bench.engine.generate(requests, SamplingParams(24), Role.STUDENT, advance=advance)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    assert some.wait(60)
    bench.engine.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "this run has ended" in str(errors[0])
    assert len(done) < 2000
    assert not adapters_at(url)


def test_a_run_one_step_ahead_of_two_servers(url: str, second: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    flags = [*SHORT[2:], *LR, "--schedule", "async"]
    flags += ["--inference.server_urls", urls(url, second[0])]
    assert cli.main(["run", SOKOBAN, *flags, "--output_dir", str(path)]) == EXIT_OK
    found = steps(path)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert found[0]["kl/sampler_mismatch"] < 1e-8
    assert found[0]["async/staleness"] == 0
    assert any(record["async/overlap"] > 0 for record in found[1:])
    assert_token_versions_match_metrics(path)
    assert [adapters_at(one) for one in (url, second[0])] == [[], []]
    assert not (path / "sync").exists()


def test_one_of_two_servers_dies_is_waited_for_and_dies_again(
    url: str, second: tuple[str, Started], tmp_path: Path
) -> None:
    dying, process = second
    run = start(
        tmp_path / "run", *LR, "--inference.engine", "auto", "--max_steps", "5000",
        "--inference.max_restarts", "1", "--inference.server_urls", urls(url, dying),
    )  # fmt: skip
    run.until("step 2/")
    os.killpg(process.pid, signal.SIGKILL)
    run.until(f"warning: the vLLM server at {dying} is away")
    port = int(dying.rpartition(":")[2])
    with serving(tmp_path / "log", *ADAPTERS, port=port) as (_, again):
        run.until("step ")
        run.until("step ")
        os.killpg(again.pid, signal.SIGKILL)
        text = run.rest()
    assert run.process.wait() == EXIT_ENVIRONMENT, text
    assert f"the vLLM server at {dying} has gone away" in text
    assert "waited for it 1 times" in text
    assert "inference.server_urls" in text
    assert "--resume continues" in text
    assert not run.left_behind()
    assert not (run.path / "sync").exists()
    assert not adapters_at(url)
    found = steps(run.path)
    assert len(found) > 3
    assert all(record["kl/sampler_mismatch"] < 1e-8 for record in found)
