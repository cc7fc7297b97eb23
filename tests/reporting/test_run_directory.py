"""A run's directory: its path, its files, damage to them, and resuming from it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from minidistill.config import LoadedConfig, load_config
from minidistill.driver.resume import is_extended
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.reporting.rollout_log import TokenTexts, write_rollouts
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.run_path import choose_path
from minidistill.types import Completion, Prompt, Reward, Rollout, Task, TokenFigures

CONFIG = """\
[orchestrator.teacher_model]
context = "Denk zuerst nach: ö\\n"

[[orchestrator.env]]
id = "sokoban-env"
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedConfig]:
    """Loads configurations named `a`, or `name`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(*flags: str, name: str = "a") -> LoadedConfig:
        Path(f"{name}.toml").write_text(CONFIG, encoding="utf-8")
        return load_config([f"{name}.toml", *flags])

    return load


def make_run(path: Path | str) -> Path:
    """Create a directory that holds a run."""
    Path(path).mkdir(parents=True)
    (Path(path) / "config.resolved.json").write_text("{}")
    return Path(path)


def refusal(loaded: LoadedConfig, resume: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        choose_path(loaded, resume)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


def test_runs_are_numbered(load: Callable[..., LoadedConfig]) -> None:
    for name in ("a", "a-2", "a-10"):
        assert choose_path(load(), resume=False).parent == Path("runs")
        make_run(f"runs/{name}")
    for stray in ("a-x", "ab", "a-3-old", "a-", "a-²", "b-40"):
        make_run(f"runs/{stray}")
    assert choose_path(load(), resume=False) == Path("runs/a-11")
    assert choose_path(load(), resume=True) == Path("runs/a-10")
    assert choose_path(load(name="c"), resume=False) == Path("runs/c")


def test_a_name_is_not_a_glob_pattern(load: Callable[..., LoadedConfig]) -> None:
    make_run("runs/[a]")
    make_run("runs/a-7")
    assert choose_path(load(name="[a]"), resume=False) == Path("runs/[a]-2")
    assert choose_path(load(name="[a]"), resume=True) == Path("runs/[a]")


def test_a_directory_holds_one_run(load: Callable[..., LoadedConfig], tmp_path: Path) -> None:
    loaded = load("--output_dir", "out/deep")
    assert choose_path(loaded, resume=False) == Path("out/deep")
    Path("out/deep").mkdir(parents=True)
    assert choose_path(loaded, resume=False) == Path("out/deep")
    (tmp_path / "out/deep/notes.txt").write_text("")
    error = refusal(loaded)
    assert "is not empty" in error.what
    assert "--resume" not in error.fix
    (tmp_path / "out/deep/config.resolved.json").write_text("{}")
    error = refusal(loaded)
    assert "already holds a run" in error.what
    assert "--resume" in error.fix
    assert error.where == "--output_dir"
    assert choose_path(loaded, resume=True) == Path("out/deep")


def test_nothing_to_resume(load: Callable[..., LoadedConfig]) -> None:
    assert "no run to resume" in refusal(load(), resume=True).what
    Path("runs/a").mkdir(parents=True)
    assert "no run to resume in runs/a" in refusal(load(), resume=True).what
    assert "no run to resume" in refusal(load("--output_dir", "x"), resume=True).what


def test_a_file_in_place_of_a_directory(load: Callable[..., LoadedConfig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/x", "file/x/y"):
        assert "not a writable directory" in refusal(load("--output_dir", place)).what


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "x" * 300, "dangling/run"])
def test_a_directory_that_cannot_be_created(
    load: Callable[..., LoadedConfig], tmp_path: Path, place: str
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    loaded = load("--output_dir", place)
    with pytest.raises(UserError) as caught:
        RunDirectory(choose_path(loaded, resume=False)).create(loaded, {})
    assert caught.value.exit_code in (EXIT_USAGE, EXIT_ENVIRONMENT)
    assert place in caught.value.what


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("~no-such-user/run", "home directory"),
        ("a\0b", "it has a null character"),
        ("dangling", "it is a symbolic link that leads nowhere"),
        ("loop", "it is a symbolic link that leads nowhere"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_path_that_no_directory_can_have(
    load: Callable[..., LoadedConfig], place: str, reason: str, resume: bool
) -> None:
    loaded = load("--output_dir", place)
    Path("dangling").symlink_to("gone")
    Path("loop").symlink_to("loop")
    error = refusal(loaded, resume)
    assert "cannot be a run's directory" in error.what
    assert reason in error.what
    assert (error.where, "--output_dir" in error.fix) == ("--output_dir", True)


@pytest.mark.parametrize("flags", [(), ("--output_dir", "run")])
def test_the_current_directory_has_gone(
    load: Callable[..., LoadedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: Any
) -> None:
    loaded = load(*flags)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    error = refusal(loaded)
    monkeypatch.chdir(tmp_path)
    assert "the current directory: No such file or directory" in error.what
    assert "absolute path" in error.fix


@pytest.fixture
def run(load: Callable[..., LoadedConfig]) -> RunDirectory:
    run = RunDirectory(Path("runs/a"))
    run.create(load(), {"device": "cpu"})
    return run


def test_files_of_a_new_run(run: RunDirectory, load: Callable[..., LoadedConfig]) -> None:
    again = load_config([str(run.path / "config.toml")])
    assert again.config == load().config
    assert run.read("config.resolved.json") == load().resolved()
    facts = run.read("env.json")
    assert facts["device"] == "cpu"
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "numpy"} <= facts["packages"].keys()
    assert run.read("scoreboard.json") is None
    assert not list(run.path.rglob("*.tmp"))


def test_a_run_is_resumed_only_with_the_same_settings(
    run: RunDirectory, load: Callable[..., LoadedConfig]
) -> None:
    assert not is_extended(load(), run)
    assert not is_extended(load("--output_dir", "elsewhere", "--wandb.project", "p"), run)
    with pytest.raises(UserError) as caught:
        is_extended(load("--seed", "7", "--trainer.loss.adv_tau", "0"), run)
    assert "seed (was 0, now 7)" in caught.value.what
    assert "trainer.loss.adv_tau (was 0.5, now 0" in caught.value.what
    assert caught.value.where == "--seed"
    with pytest.raises(UserError, match=r"teacher_model\.context"):
        is_extended(load("--orchestrator.teacher_model.context", "other"), run)


def test_a_run_is_extended_where_its_learning_rates_allow_it(
    run: RunDirectory, load: Callable[..., LoadedConfig]
) -> None:
    assert is_extended(load("--max_steps", "101"), run)  # constant, the default
    with pytest.raises(UserError, match="cannot be lowered to 99"):
        is_extended(load("--max_steps", "99"), run)
    for flags, extends in (
        (("linear", "--trainer.scheduler.decay_steps", "50"), True),
        (("cosine",), False),
    ):
        flags = ("--trainer.scheduler.type", *flags)
        other = RunDirectory(Path(f"runs/{flags[1]}"))
        other.create(load(*flags), {})
        if extends:
            assert is_extended(load(*flags, "--max_steps", "200"), other)
            continue
        with pytest.raises(UserError, match="depends on max_steps") as caught:
            is_extended(load(*flags, "--max_steps", "200"), other)
        assert (caught.value.exit_code, caught.value.where) == (EXIT_USAGE, "--max_steps")
        assert 'trainer.model.lora.init = "runs/cosine"' in caught.value.fix


def test_settings_that_are_newer_than_a_run_do_not_keep_it_from_resuming(
    run: RunDirectory, load: Callable[..., LoadedConfig]
) -> None:
    settings = run.read("config.resolved.json")
    del settings["orchestrator"]["overlong"]
    run.write("config.resolved.json", settings)
    assert not is_extended(load(), run)
    with pytest.raises(UserError, match=r"orchestrator\.overlong \(was None, now 'drop'\)"):
        is_extended(load("--orchestrator.overlong", "drop"), run)


class CodePoints:
    """A tokenizer whose ids are code points. It records the ids it decoded."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def decode(self, ids: list[int]) -> str:
        self.decoded += ids
        return "".join(map(chr, ids))


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def make_rollout(
    index: int, ids: tuple[int, ...], reward: Reward | None
) -> tuple[Rollout, TokenFigures]:
    prompt = Prompt("sokoban", Task("t", ({"role": "user", "content": "x"},)), "s", "t", (1,), (2,))
    logprobs = tuple(-0.5 * i for i in range(len(ids)))
    text = "a\u2028b\x85c\n" + "".join(map(chr, ids))
    completion = Completion(ids, logprobs, "length" if index else "eos")
    rollout = Rollout(prompt, index, completion, text, reward, advantage=0.25, policy_version=11)
    zeros = torch.zeros(len(ids))
    return rollout, TokenFigures(
        loss=zeros,
        logp=torch.tensor([-1.0 - i for i in ids]),
        teacher_logp=torch.tensor([-1.5 for _ in ids]),
        kl=torch.tensor([0.125 * i for i in ids]),
        entropy=zeros,
        teacher_entropy=None,
        ratio=zeros + 1,
        masked=zeros.bool(),
        ratio_clipped=zeros.bool(),
        kl_clipped=zeros.bool(),
    )


def test_rollouts_on_disk(tmp_path: Path) -> None:
    ids = [(65, 66, 65), (67,), (70, 2_000, 0x1F9F1, 65)]
    rewards = [Reward(1.0, {"solved": 1.0, "odd": float("nan")}), None, Reward(0.0)]
    pairs = [make_rollout(i, *pair) for i, pair in enumerate(zip(ids, rewards, strict=True))]
    rollouts, per_rollout = zip(*pairs, strict=True)
    tokenizer = CodePoints()
    (tmp_path / "rollouts").mkdir()
    sums = write_rollouts(tmp_path, 12, rollouts, per_rollout, TokenTexts(tokenizer))
    assert sorted(tokenizer.decoded) == sorted({i for row in ids for i in row})

    assert list(sums) == ["rollouts/step_000012.jsonl", "rollouts/step_000012.safetensors"]
    for name, sum in sums.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sum
    lines = (tmp_path / "rollouts/step_000012.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [next(iter(row)) for row in rows] == ["schema_version"] * 3
    assert [row["tokens"] for row in rows] == [[chr(i) for i in row] for row in ids]
    assert [row["completion"] for row in rows] == [r.text for r in rollouts]
    assert [row["reward"] for row in rows] == [1.0, None, 0.0]
    assert rows[0]["reward_metrics"] == {"solved": 1.0, "odd": None}
    assert [row["truncated"] for row in rows] == [False, True, True]
    assert rows[1] | {"mean_logprob_gap": -66.5, "worst_logprob_gap": -66.5, "step": 12,
                      "policy_version": 11, "sample": 1, "advantage": 0.25, "task_id": "t",
                      "prompt_text": "s", "teacher_prompt_text": "t", "env": "sokoban",
                      "messages": [{"role": "user", "content": "x"}]} == rows[1]  # fmt: skip
    assert rows[0]["worst_logprob_gap"] == -64.5

    tensors = load_file(tmp_path / "rollouts/step_000012.safetensors")
    assert tensors["offsets"].tolist() == [0, 3, 4, 8]
    for r, (rollout, tokens) in enumerate(pairs):
        part = slice(*tensors["offsets"][r : r + 2])
        assert tensors["token_ids"][part].tolist() == list(rollout.completion.token_ids)
        assert tensors["sampler_logprobs"][part].tolist() == list(rollout.completion.logprobs)
        assert tensors["student_logprobs"][part].tolist() == tokens.logp.tolist()
        assert tensors["teacher_logprobs"][part].tolist() == tokens.teacher_logp.tolist()
        assert tensors["kl"][part].tolist() == tokens.kl.tolist()
    assert tensors["token_ids"].dtype == np.int64
    assert tensors["kl"].dtype == np.float32


def test_a_step_without_rollouts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    write_rollouts(tmp_path, 1, [], [], TokenTexts(CodePoints()))
    assert (tmp_path / "rollouts/step_000001.jsonl").read_bytes() == b""
    tensors = load_file(tmp_path / "rollouts/step_000001.safetensors")
    assert tensors["token_ids"].dtype == np.int64
    assert tensors["offsets"].tolist() == [0]
