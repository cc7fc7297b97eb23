"""Runs with a context and no prompts: the model writes them itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpus import REHEARSED
from support.paths import ROOT
from support.runs import records

from minidistill import cli
from minidistill.config import load_config
from minidistill.envs import load_environment
from minidistill.envs.self_prompts import Choice
from minidistill.errors import EXIT_OK, EXIT_USAGE
from minidistill.models.registry import BUILT_IN
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.tasks.chat_template import ChatTemplate

# All that a run needs beside a context. The rest keeps it short.
SELF_PROMPTS = ("--orchestrator.env.0.id", "self-prompts")
CONTEXT = ("--orchestrator.teacher_model.context", "You are an expert of puzzles.\n\n")
PURE = ("--trainer.loss.adv_tau", "0", "--orchestrator.buffer.skip_verification")
SHORT = (
    "--max_steps", "2", "--seq_len", "256", "--ckpt.interval", "1",
    "--orchestrator.batch_size", "4", "--orchestrator.rollouts_per_example", "2",
    "--orchestrator.sampling.max_tokens", "8",
    "--orchestrator.env.0.args.count", "12", "--orchestrator.env.0.args.max_tokens", "64",
)  # fmt: skip
QUESTIONS = str(ROOT / "configs" / "questions.jsonl")
FLAGS = (*SELF_PROMPTS, *CONTEXT, *PURE, *SHORT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the files, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minidistill" / "self-prompts"


def prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def asked(run: Path) -> set[str]:
    """The prompts of a run's rollouts."""
    files = sorted((run / "rollouts").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return {json.loads(line)["messages"][-1]["content"] for line in lines}


def test_a_context_is_all_that_a_run_needs(tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(["run", *FLAGS, "--output_dir", str(run)]) == EXIT_OK
    [file] = cache.iterdir()
    texts = prompts(file)
    assert len(texts) == len(set(texts)) == 12
    assert all("<|" not in text for text in texts)
    assert asked(run) <= set(texts)
    before = file.read_bytes()

    # resumed with the file, and without it, where the same one is sampled again
    whole = tmp_path / "whole"
    assert cli.main(["run", *FLAGS, "--max_steps", "3", "--output_dir", str(whole)]) == EXIT_OK
    shutil.rmtree(cache)
    more = ["--max_steps", "3", "--resume", "--output_dir", str(run)]
    assert cli.main(["run", *FLAGS, *more]) == EXIT_OK
    assert file.read_bytes() == before
    assert records(run) == records(whole)


def test_the_settings_the_model_and_the_template_name_the_file(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(*flags: str) -> str:
        assert cli.main(["env", "prompts", *FLAGS, *flags]) == EXIT_OK
        return capsys.readouterr().out.strip()

    first = written()
    assert Path(first).parent == cache
    assert prompts(Path(first))
    assert written() == first
    assert written("--orchestrator.teacher_model.context", "Another context.\n\n") == first
    other = written("--orchestrator.env.0.args.seed", "1")
    assert other != first
    assert prompts(Path(other)) != prompts(Path(first))
    copy = tmp_path / "tiny-sokoban"
    shutil.copytree(BUILT_IN["tiny-sokoban"], copy)
    assert written("--model.name", str(copy)) == first  # wherever the model is
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert written("--model.name", str(copy)) not in (first, other)


def test_prompts_can_be_read_and_edited_before_the_run(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    named = ("--orchestrator.env.0.args.path", str(file))
    assert cli.main(["env", "prompts", *FLAGS, *named]) == EXIT_OK
    assert capsys.readouterr().out.strip() == str(file)
    assert not cache.exists()
    kept = prompts(file)[:4]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in kept))
    run = tmp_path / "run"
    assert cli.main(["run", *FLAGS, *named, "--output_dir", str(run)]) == EXIT_OK
    assert asked(run) <= set(kept)
    assert prompts(file) == kept


def test_topics_take_turns_and_are_recorded(tmp_path: Path, cache: Path) -> None:
    flags = ("--orchestrator.env.0.args.topics", '["boxes", "walls"]')
    assert cli.main(["env", "prompts", *FLAGS, *flags]) == EXIT_OK
    [file] = cache.iterdir()
    topics = [json.loads(line)["topic"] for line in file.read_text().splitlines()]
    assert set(topics) == {"boxes", "walls"}


def test_with_the_context_as_topic_the_model_reads_it_and_no_prompt_repeats_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openings, contexts = set(), set()
    encode, made = ChatTemplate.encode, Choice.__init__

    def encoded(self: ChatTemplate, text: str) -> Any:
        openings.add(text)
        return encode(self, text)

    def choice(self: Choice, lines: Any = (), context: str = "") -> None:
        contexts.add(context)
        made(self, lines, context)

    monkeypatch.setattr(ChatTemplate, "encode", encoded)
    monkeypatch.setattr(Choice, "__init__", choice)
    few = ("--orchestrator.env.0.args.count", "4")
    flags = ("--orchestrator.env.0.args.topics", "context", *few)
    assert cli.main(["env", "prompts", *FLAGS, *flags]) == EXIT_OK
    assert "<|system|>You are an expert of puzzles.<|end|><|user|>" in openings
    assert contexts == {CONTEXT[1].strip()}


def test_too_few_prompts_are_one_error_that_says_what_to_change(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    short = ("--orchestrator.env.0.args.max_tokens", "1")
    assert cli.main(["run", *FLAGS, *short, "--output_dir", str(run)]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert "of 49 sampled texts it left out" in err
    assert "longer than max_tokens" in err
    assert "lower count in its args" in err
    assert not cache.exists()
    assert not (run / "config.toml").exists()


def test_turns_that_do_not_fit_into_a_sequence_are_refused(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("--orchestrator.env.0.args.max_tokens", "256")
    assert cli.main(["env", "prompts", *FLAGS, *long]) == EXIT_USAGE
    assert "more than a sequence of 256" in capsys.readouterr().err
    assert not cache.exists()


def test_a_missing_reward_is_refused_before_anything_is_sampled(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*SELF_PROMPTS, *CONTEXT, *SHORT, "--output_dir", str(tmp_path / "run"))
    assert cli.main(["run", *flags]) == EXIT_USAGE
    assert "'self-prompts' has no reward" in capsys.readouterr().err
    assert not cache.exists()


def test_the_shipped_configuration_fits_a_gpu_of_24_gb(offline: None) -> None:
    loaded = load_config([str(ROOT / "configs" / "self-prompts.toml")])
    machine = Machine(gpus=1, bytes=24 * GIB, vllm=True, bf16=True, bitsandbytes=True)
    assert plan_run(loaded, machine, shipped=True).fits
    trained, [held_out] = loaded.config.orchestrator.env, loaded.config.orchestrator.eval.env
    assert [env.id for env in trained] == ["self-prompts"]
    assert len(load_environment("jsonl", {**held_out.args, "path": QUESTIONS}).eval) == 24


@pytest.mark.gpu
def test_the_model_that_writes_prompts_leaves_no_memory_on_a_gpu(cache: Path) -> None:
    before = torch.cuda.memory_reserved() if not REHEARSED else 0
    assert cli.main(["env", "prompts", *FLAGS]) == EXIT_OK
    assert cache.is_dir()
    assert REHEARSED or torch.cuda.memory_reserved() <= before


def test_a_configuration_without_self_prompts_has_none_to_write(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["env", "prompts", "configs/sokoban.toml"]) == EXIT_USAGE
    assert "has no self-prompts" in capsys.readouterr().err
