"""Each JSON file that a resumed run reads: a damaged one is named, with what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL

from minidistill.config import LoadedConfig, load_config
from minidistill.driver import baseline, summary
from minidistill.driver.resume import check_nothing_was_saved, is_extended
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.html import write_report
from minidistill.reporting.run_directory import RunDirectory

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b"\xff\xfe\x80" * 30,
    "another type": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "nested": lambda data: b"[" * 100_000,
    "a key twice": lambda data: b'{"a": 1, ' + data.strip()[1:-1] + b', "a": 2}',
}
BASELINE = {
    "rewards": {"baseline_student": {"e": [0.0, 1.0]}, "baseline_teacher": {"e": [1.0, 1.0]}},
    "heldout_kl": 1.5,
    "seconds": 2.0,
    "heldout_by_prompt": {"mean": 1.5, "sums": [1.0, 2.0], "tokens": [1, 1]},
    "unrelated_by_prompt": None,
    "completions": [],
}
BOARD = {"steps": 6, "seconds": 3.0, "verdict": "It is closed.", "gap_closed": 0.9}


class Shown:
    """A display that keeps the scoreboards."""

    def __init__(self) -> None:
        self.boards: list[Any] = []

    def scoreboard(self, board: Any) -> None:
        self.boards.append(board)


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedConfig:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(MINIMAL)
    return load_config(["a.toml", "--output_dir", "out"])


@pytest.fixture
def run(loaded: LoadedConfig) -> RunDirectory:
    """A run that has ended."""
    run = RunDirectory(Path("out"))
    run.create(loaded, {"tasks": "t", "initial_adapter": "a", "began": "2026-01-02T03:04:05"})
    run.add("baseline.json", BASELINE)
    run.log(1, {"teacher_kl": 1.0})
    (run.path / "adapter").mkdir()
    (run.path / "adapter/tensors").write_text("1")
    run.records.add_files(["adapter/tensors"])
    run.write("scoreboard.json", BOARD)
    run.records.add_files(["metrics.jsonl", "scoreboard.json"])
    return run


READERS: dict[str, list[Callable[[RunDirectory, LoadedConfig], Any]]] = {
    "config.resolved.json": [lambda run, loaded: is_extended(loaded, run)],
    "env.json": [
        lambda run, loaded: run.check_same_tasks("t"),
        lambda run, loaded: run.check_same_adapter("a"),
        lambda run, loaded: run.began(),
    ],
    "baseline.json": [lambda run, loaded: baseline.read(run, ["e"])],
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", [*DAMAGES, "a folder", "a pipe"])
def test_a_damaged_file_is_named(
    run: RunDirectory, loaded: LoadedConfig, name: str, damage: str
) -> None:
    path = run.path / name
    for read in READERS[name]:
        read(run, loaded)
    data = path.read_bytes()
    path.unlink()
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](data))
    else:
        (os.mkfifo if damage == "a pipe" else os.mkdir)(path)
    for read in READERS[name]:
        with pytest.raises(UserError, match=f"^{path} is damaged: ") as caught:
            read(run, loaded)
        assert caught.value.exit_code == EXIT_ENVIRONMENT
        assert caught.value.where.startswith(str(path))
        assert "restore it from a copy" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("config.resolved.json", {"orchestrator": None}, "orchestrator: "),
        ("config.resolved.json", {"orchestrator": {"env": 7}}, "orchestrator.env: "),
        ("config.resolved.json", {"orchestrator": {"eval": {"env": [1]}}}, "orchestrator.eval.env"),
        ("config.resolved.json", {"trainer": {}}, "trainer.model: "),
        ("config.resolved.json", {"trainer": {"model": {"lora": 7}}}, "trainer.model.lora"),
        ("config.resolved.json", {"max_steps": "9"}, "max_steps: "),
        ("env.json", {"tasks": 7}, "tasks: "),
        ("env.json", {"initial_adapter": ["a"]}, "initial_adapter: "),
        ("env.json", {"began": 1.5}, "began: "),
        ("env.json", {"began": "yesterday"}, "began: "),
        ("baseline.json", {"rewards": [1]}, "rewards: "),
        ("baseline.json", {"rewards": {"baseline_student": {"e": [1.0]}}}, "rewards: "),
        ("baseline.json", {"rewards": BASELINE["rewards"] | {"x": {}}}, "rewards: "),  # type: ignore[operator]
        (
            "baseline.json",
            {"rewards": {"baseline_student": {"e": [1.0]}, "baseline_teacher": {"e": []}}},
            "rewards.baseline_teacher.e: ",
        ),
        (
            "baseline.json",
            {"rewards": {"baseline_student": {"o": [1.0]}, "baseline_teacher": {"e": [1.0]}}},
            "it lacks e",
        ),
        ("baseline.json", {"heldout_kl": None}, "heldout_kl: "),
        ("baseline.json", {"heldout_by_prompt": {"mean": 1.0}}, "heldout_by_prompt.sums: "),
        (
            "baseline.json",
            {"heldout_by_prompt": {"mean": 1.0, "sums": [1.0, 2.0], "tokens": [1]}},
            "heldout_by_prompt: ",
        ),
        ("baseline.json", {"completions": {}}, "completions: "),
    ],
)
def test_a_file_of_another_shape_is_named_with_the_place(
    run: RunDirectory, loaded: LoadedConfig, name: str, change: dict[str, Any], problem: str
) -> None:
    run.write(name, run.read(name) | change)
    with pytest.raises(UserError, match=f"^{run.path / name} is damaged: {problem}") as caught:
        READERS[name][0](run, loaded)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_missing_environment_is_damage(run: RunDirectory) -> None:
    (run.path / "env.json").unlink()
    with pytest.raises(UserError, match=r"env\.json is damaged: it is missing"):
        run.check_same_tasks("t")


@pytest.mark.parametrize("damage", [*DAMAGES, "other steps", "an adapter", "metrics", "list"])
def test_a_run_with_a_damaged_part_has_not_finished(
    run: RunDirectory, loaded: LoadedConfig, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Its end is repeated, with a warning that names the file."""
    display: Any = Shown()
    assert summary.show_finished(run, display, loaded.config)
    assert display.boards == [BOARD]
    path = run.path / "scoreboard.json"
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    elif damage == "other steps":
        run.write("scoreboard.json", BOARD | {"steps": 5})
    else:
        names = {"an adapter": "adapter/tensors", "metrics": "metrics.jsonl", "list": "SHA256SUMS"}
        path = run.path / names[damage]
        path.write_bytes(path.read_bytes()[:-1])
    caplog.clear()
    assert not summary.show_finished(RunDirectory(run.path), display, loaded.config)
    [message] = caplog.messages
    assert path.name in message
    assert message.endswith("damaged: the run's end is repeated from its last checkpoint") or (
        "damaged: " in message
    )
    assert display.boards == [BOARD]


def test_a_run_of_an_older_version_has_finished(run: RunDirectory, loaded: LoadedConfig) -> None:
    (run.path / "SHA256SUMS").unlink()
    display: Any = Shown()
    assert summary.show_finished(RunDirectory(run.path), display, loaded.config)
    (run.path / "adapter/tensors").unlink()
    (run.path / "adapter").rmdir()
    assert not summary.show_finished(RunDirectory(run.path), display, loaded.config)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    run: RunDirectory, loaded: LoadedConfig
) -> None:
    with pytest.raises(UserError, match=r"checkpoints has no checkpoint, but .* has 1 step") as e:
        check_nothing_was_saved(loaded.config, run)
    assert e.value.exit_code == EXIT_ENVIRONMENT
    (run.path / "scoreboard.json").unlink()
    interval = loaded.config.ckpt.interval or loaded.config.max_steps
    run.log(interval, {"teacher_kl": 1.0})
    check_nothing_was_saved(loaded.config, run)  # killed just before the first one
    run.log(interval + 1, {"teacher_kl": 1.0})
    with pytest.raises(UserError, match="has no checkpoint"):
        check_nothing_was_saved(loaded.config, run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "scoreboard.json", "env.json", "rollouts/step_000001.jsonl",
     "rollouts/step_000001.safetensors"],
)  # fmt: skip
def test_a_report_names_what_is_damaged(
    run: RunDirectory, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = {"env": "e", "task_id": "t", "tokens": ["a"], "completion": "a", "reward": 1.0}
    (run.path / "rollouts/step_000001.jsonl").write_text(json.dumps(rollout) + "\n")
    (run.path / "rollouts/step_000001.safetensors").write_bytes(b"\x10" + bytes(20))
    path = run.path / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    html = write_report(run.path).read_text(encoding="utf-8")
    if name.endswith(".safetensors"):
        assert "step_000001.safetensors cannot be read" in html
    elif path.stat().st_size and damage != "a key twice":
        assert f"{path.name} is damaged" in html or f"{path.name}: 1 damaged line" in html
        assert any(path.name in message for message in caplog.messages)


@pytest.mark.parametrize("value", [7, "x", [1], {"a": 1}, None, True, -1e999])
def test_a_report_of_a_scoreboard_with_other_values_is_written(
    run: RunDirectory, value: Any
) -> None:
    names = ["verdict", "missing", "gap_closed", "gap_closed_low", "heldout_kl_closed", "steps"]
    names += ["seconds", "completions", "per_env", "baseline_diff", "drift_kl", "eval_tasks"]
    for name in names:
        run.write("scoreboard.json", BOARD | {name: value})
        assert write_report(run.path).exists()
