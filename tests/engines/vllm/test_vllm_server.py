"""The engine that is a running vLLM server: a real one, of the shipped model, on the CPU."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.servers import adapters_at, engine_at, free_port, serving
from support.vllm import (
    NEEDS_CPU_VLLM,
    SHORT,
    SOKOBAN,
    Bench,
    placement_of,
    policy_of,
    start,
    steps,
)

from bench.serving_client import ask, blocks_of
from minidistill import cli
from minidistill.config import Config, load_config
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.server.http import Client, GoneError
from minidistill.engines.server.probe import server_command
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_USAGE, UserError
from minidistill.models.registry import resolve
from minidistill.trainer.forward import PrefixCache
from minidistill.types import Request, Role, SamplingParams

pytestmark = NEEDS_CPU_VLLM
VERSIONS = count(1)


@pytest.fixture(scope="module")
def bench(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    config = load_config([SOKOBAN, "--inference.server_urls", f'["{url}"]']).config
    policy = policy_of(config)
    engine = engine_at(url + "/v1", tmp_path_factory.mktemp("run") / "sync")
    engine.attach(policy, (Role.STUDENT, Role.TEACHER))
    engine.wait_until_ready()
    yield Bench(config, policy, engine)  # type: ignore[arg-type]
    engine.close()
    assert not engine._adapters.folder.exists()
    assert not adapters_at(url)


def test_the_serving_benchmark_times_tokens_and_reads_blocks(url: str) -> None:
    # keys and values of 4 layers and 4 heads of 32, in fp32
    assert blocks_of(url).total == (64 << 20) // (32 * 2 * 4 * 4 * 32 * 4)
    prompts = [tuple(range(first, first + 100)) for first in (10, 200)]
    result = ask(url, resolve("tiny-sokoban"), prompts, 128, look=True)
    for answer in result.answers:
        assert len(answer.times) == 128
        assert 0 < answer.first < answer.times[-1] <= result.seconds
    # 100 tokens are 4 blocks of 32, 164 are 6
    assert result.blocks is None or 2 * 4 <= result.blocks <= 2 * 6


def worst(bench: Bench, role: Role) -> float:
    rows = [(p[:12], p[12:]) for p in bench.prompts(8, length=44)]
    prompts, completions = map(list, zip(*rows, strict=True))
    found = bench.engine.score(prompts, completions, role)
    truth = [bench.truth(*row, role) for row in rows]
    return max(
        abs(a - b) for x, y in zip(found, truth, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_both_roles_agree_with_peft_after_every_sync(bench: Bench) -> None:
    for version in range(6):
        bench.change(seed=version)
        bench.engine.sync(next(VERSIONS))
        for _ in range(2):  # the second time the prompts are in the prefix cache
            assert worst(bench, Role.STUDENT) < 1e-4
            assert worst(bench, Role.TEACHER) < 1e-4
    bench.change(seed=99)  # not synced: the server must now be wrong
    assert worst(bench, Role.STUDENT) > 1e-2
    bench.engine.sync(next(VERSIONS))
    left = [path.name for path in bench.engine._adapters.folder.iterdir()]
    assert left == adapters_at(bench.engine.location), "former versions are deleted"
    assert len(left) == 1


@pytest.mark.parametrize("role", [Role.TEACHER, Role.STUDENT])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampled_logprobs_are_the_models(bench: Bench, role: Role, temperature: float) -> None:
    bench.change(seed=8)
    version = next(VERSIONS)
    bench.engine.sync(version)
    asked = [Request(p, (1 << 63) + i) for i, p in enumerate(bench.puzzles(6))]
    told: list[int] = []
    ask = SamplingParams(9, temperature), role
    found = bench.engine.generate(asked, *ask, advance=told.append)
    assert sum(told) == 6
    for request, completion in zip(asked, found, strict=True):
        truth = bench.truth(request.prompt_ids, completion.token_ids, role, temperature or 1.0)
        assert completion.logprobs == pytest.approx(truth, abs=1e-4)
        assert completion.versions == (((0, version),) if role is Role.STUDENT else ())
        assert (completion.token_ids[-1] in bench.policy.eos_ids) == (completion.stop == "eos")
    alone = [bench.engine.generate([request], *ask)[0] for request in asked]
    assert [c.token_ids for c in alone] == [c.token_ids for c in found], "seeds decide"


def test_a_run_on_a_server_has_the_trainers_weights_at_every_step(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SHORT[2:], "--trainer.optim.lr", "1e-3", "--inference.server_urls", f'["{url}"]']
    path = tmp_path / "run"
    assert cli.main(["run", SOKOBAN, *flags, "--output_dir", str(path)]) == EXIT_OK
    found = steps(path)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert all(record["kl/sampler_mismatch"] < 1e-8 for record in found)
    assert re.search(rf"engine +vLLM server at {url}", capsys.readouterr().out)
    assert not (path / "sync").exists()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "every-weight"])
def test_a_teacher_on_a_server_beside_the_embedded_student(
    url: str, tmp_path: Path, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log-probs are the frozen base's: those that the trainer computes itself."""
    flags = [*SHORT, "--inference.engine", "embedded", "--trainer.loss.estimator", "sampled"]
    flags += ["--no-trainer.model.lora"] if full else []
    teacher = ["--teacher_inference.server_urls", f'["{url}"]']
    runs = {"served": teacher, "own": []}
    for name, more in runs.items():
        argv = ["run", SOKOBAN, *flags, *more, "--output_dir", str(tmp_path / name)]
        assert cli.main([*argv, "--max_steps", "2"]) == EXIT_OK
    for served, own in zip(steps(tmp_path / "served"), steps(tmp_path / "own"), strict=True):
        assert served["time/teacher"] > 0
        assert served["combined_advantage"] == pytest.approx(own["combined_advantage"], abs=1e-4)
        assert served["optim/grad_norm"] == pytest.approx(own["optim/grad_norm"], rel=1e-3)


def test_nothing_listening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SHORT[2:], "--inference.server_urls", f'["http://127.0.0.1:{free_port()}"]']
    argv = ["run", SOKOBAN, *flags, "--output_dir", str(tmp_path / "run")]
    assert cli.main(argv) == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert "inference.server_urls" in error
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve tiny-sokoban" in error
    assert not (tmp_path / "run").exists()


def test_a_server_with_too_short_sequences(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allows 257 tokens, the run needs 258"):
        engine_at(bench.engine.location, tmp_path, min_length=258).wait_until_ready()


def test_another_model_is_refused(bench: Bench) -> None:
    """The trainer's copy is changed in place, which the server's is not."""
    policy = bench.policy
    trainer = EmbeddedEngine(policy, PrefixCache(policy, shares=False))
    bench.change(seed=0, scale=0.0)
    bench.engine.verify(trainer, 0.6)
    weight = policy.student.model.norm.weight
    before = weight.data.clone()
    weight.data *= 1.5
    try:
        with pytest.raises(UserError, match="another model") as caught:
            bench.engine.verify(trainer, 1.0)
        assert caught.value.exit_code == EXIT_ENVIRONMENT
    finally:
        weight.data.copy_(before)


def test_what_a_server_refuses_is_one_clear_error(bench: Bench) -> None:
    with pytest.raises(UserError, match="257") as caught:
        bench.engine.score([(5,) * 300], [(6,)], Role.TEACHER)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    with pytest.raises(ValueError, match="temperature 1"):
        bench.engine.score([(1,)], [(2,)], Role.TEACHER, 0.5)


def test_a_server_without_adapters_or_processed_logprobs_and_one_that_dies(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as (url, process):
        config = load_config([SOKOBAN]).config
        policy = policy_of(config)
        engine = engine_at(url, tmp_path / "sync")
        engine.attach(policy, (Role.STUDENT, Role.TEACHER))
        with pytest.raises(
            UserError, match=r"does not load adapters at run time.*--enable-lora"
        ) as caught:
            engine.wait_until_ready()
        assert "vllm serve M" in str(caught.value.fix)
        engine.attach(policy, (Role.TEACHER,))  # a teacher's
        engine.wait_until_ready()
        trainer = EmbeddedEngine(policy, PrefixCache(policy, shares=False))
        engine.verify(trainer, 1.0)
        with pytest.raises(UserError, match="of another distribution than it samples") as caught:
            engine.verify(trainer, 0.6)
        assert "--logprobs-mode processed_logprobs" in str(caught.value.fix)

        run = start(
            tmp_path / "run", "--inference.engine", "embedded", "--inference.max_restarts", "0",
            "--trainer.loss.estimator", "sampled", "--max_steps", "500",
            "--teacher_inference.server_urls", f'["{url}"]',
        )  # fmt: skip
        run.until("step 2/")
        os.killpg(process.pid, signal.SIGKILL)
        text = run.rest()
        assert run.process.wait() == EXIT_ENVIRONMENT, text
        assert "has gone away" in text
        assert "teacher_inference.server_urls" in text


def test_a_server_that_comes_back_gets_the_adapter_and_what_it_had_not_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, engine, really = [], bench.engine, Client.send_all
    truth = worst(bench, Role.STUDENT)
    monkeypatch.setattr(engine.server, "max_restarts", 1)

    def drop(client: Client, act: Any, indices: list[int], *rest: Any) -> None:
        asked.append(indices)
        if len(asked) > 1:
            return really(client, act, indices, *rest)
        really(client, act, [0, 3], *rest)
        for name in adapters_at(client.url):
            engine.server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        raise GoneError("reset")

    monkeypatch.setattr(Client, "send_all", drop)
    assert worst(bench, Role.STUDENT) == pytest.approx(truth, abs=1e-5)
    assert asked == [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 4, 5, 6, 7]]
    asked.clear()
    with pytest.raises(UserError, match=r"has gone away.*waited for it 1 times"):
        worst(bench, Role.STUDENT)


def test_a_server_that_was_started_again_between_two_calls(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing failed to connect, but it no longer knows the adapter."""
    engine = bench.engine
    engine.sync(next(VERSIONS))
    truth = worst(bench, Role.STUDENT)
    monkeypatch.setattr(engine.server, "max_restarts", engine.server.restarts + 1)
    (name,) = adapters_at(engine.location)
    engine.server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
    assert worst(bench, Role.STUDENT) == pytest.approx(truth, abs=1e-5)
    assert "was restarted" in caplog.messages[0]
    assert adapters_at(engine.location) == [name]


def test_full_fine_tuning_is_refused_for_the_students_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*SHORT[2:], "--inference.server_urls", '["http://gpu:8000"]']
    assert cli.main(["run", SOKOBAN, *flags, "--no-trainer.model.lora"]) == EXIT_USAGE
    assert "on one machine" in capsys.readouterr().err


def command_of(config: Config, *, teacher: bool = False) -> str:
    return server_command(config, placement_of(config, server=True).student, teacher=teacher)


def test_the_command_line_fits_the_adapter() -> None:
    config = load_config([SOKOBAN, "--trainer.model.lora.rank", "20"]).config
    command = command_of(config)
    assert "--max-model-len 257" in command
    assert (
        "--enable-lora --max-lora-rank 32 --max-loras 1 --lora-target-modules down_proj" in command
    )
    assert "lora" not in command_of(config, teacher=True)
    config = load_config([SOKOBAN, "--schedule", "async"]).config
    assert "--max-loras 2 " in command_of(config)
