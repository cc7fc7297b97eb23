"""What a user may get wrong: one clear error each, the right exit code, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import SOKOBAN
from support.runs import TINY, records, run

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, EXIT_OK, EXIT_USAGE

CONTEXT = "--orchestrator.teacher_model.context"
BAD = {
    "an unknown key": (("--trainer.loss.adv_taw", "1"), EXIT_USAGE, "trainer.loss.adv_tau"),
    "a wrong type": (("--max_steps", "many"), EXIT_USAGE, "max_steps"),
    "an empty context": ((CONTEXT, ""), EXIT_USAGE, "context"),
    "a blank context": ((CONTEXT, " \n "), EXIT_USAGE, "context"),
    "a context longer than the model": (
        (CONTEXT, "again and again " * 2000, "--seq_len", "100000"), EXIT_USAGE, "longest sequence",
    ),
    "a context longer than seq_len": (
        (CONTEXT, "again and again " * 60), EXIT_USAGE, "seq_len (256)",
    ),
    "an unknown environment": (("--orchestrator.env.0.id", "chess"), EXIT_USAGE, "sokoban-env"),
    "an environment's unknown argument": (
        ("--orchestrator.env.0.args.max_q", "3"), EXIT_USAGE, "max_q",
    ),
    "an environment that does not import": (
        ("--orchestrator.env.0.id", "no_such_module:load"), EXIT_USAGE, "no_such_module",
    ),
    "impossible levels": (("--orchestrator.env.0.args.min_moves", "7"), EXIT_USAGE, "max_depth"),
    "a model that is not there": (("--model.name", "no/such-model"), EXIT_USAGE, "no/such-model"),
    "a target module that is not there": (
        ("--trainer.model.lora.target_modules", "[\"nope\"]"), EXIT_USAGE, "target_modules",
    ),
    "groups that do not divide the batch": (
        ("--orchestrator.batch_size", "9"), EXIT_USAGE, "rollouts_per_example",
    ),
    "a GPU id twice": (("--trainer_gpu_ids", "1,1"), EXIT_USAGE, "trainer_gpu_ids"),
    "a GPU that is not there": (("--trainer_gpu_ids", "63"), EXIT_ENVIRONMENT, "GPU 63"),
    "replicas of the embedded engine": (
        ("--inference.parallel.dp", "2"), EXIT_USAGE, "inference.parallel.dp (--inference",
    ),
    "skipped verification with a reward": (
        ("--orchestrator.buffer.skip_verification",), EXIT_USAGE, "adv_tau",
    ),
    "a baseline without [orchestrator.eval]": (
        ("--no-orchestrator.eval",), EXIT_USAGE, "orchestrator.eval",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_error_and_nothing_written(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags, code, mentioned = BAD[name]
    path = tmp_path / "out"
    argv = ["run", SOKOBAN, "--output_dir", str(path)]
    argv += [*TINY, *flags] if name != "a baseline without [orchestrator.eval]" else flags
    assert cli.main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert mentioned in error
    assert "fix: " in error
    assert "Traceback" not in error
    assert not path.exists()


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "configs/none.toml"]) == EXIT_USAGE
    assert "configs/none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/nope", "a-file/below"])
def test_an_unwritable_output(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("kept")
    assert run(Path(place)) == EXIT_USAGE
    assert "writ" in capsys.readouterr().err
    assert Path("a-file").read_text() == "kept"


def crashing(every: int) -> tuple[str, ...]:
    env = "--orchestrator.env.0"
    named = (f"{env}.id", "support.broken_envs:crashing", f"{env}.name", "broken")
    return (*named, f"{env}.args.every", str(every))


def test_a_crashing_environment_drops_its_rollouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*crashing(4), "--orchestrator.max_env_error_frac", "0.5")
    assert run(tmp_path / "out", *flags) == EXIT_OK
    out = capsys.readouterr().out
    assert "4 rollouts dropped: task train/" in out
    assert "\x1b" not in out
    steps = [r for r in records(tmp_path / "out") if "env/errors" in r]
    assert sum(r["env/errors"] for r in steps) > 0
    for record in steps:
        lines = (tmp_path / "out" / "rollouts" / f"step_{record['step']:06d}.jsonl").read_text()
        assert len(lines.splitlines()) == 8 - record["env/errors"]


def test_an_environment_that_crashes_too_often_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *crashing(1)) == EXIT_HEALTH
    error = capsys.readouterr().err
    assert "failed on 8 of 8 rollouts" in error
    assert "ZeroDivisionError" in error
    assert "\x1b" not in error


def test_an_environment_without_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "empty.toml"
    config.write_text(
        '[orchestrator.teacher_model]\ncontext = "x "\n'
        '[[orchestrator.env]]\nid = "support.broken_envs:empty"\n'
    )
    assert cli.main(["run", str(config), "--output_dir", str(tmp_path / "out")]) == EXIT_USAGE
    assert "no tasks" in capsys.readouterr().err


def test_pure_mode_computes_no_reward_in_training(tmp_path: Path) -> None:
    flags = (
        "--trainer.loss.adv_tau", "0", "--trainer.loss.teacher_tau", "1",
        "--trainer.loss.student_tau", "1", "--orchestrator.buffer.skip_verification",
    )  # fmt: skip
    assert run(tmp_path / "out", *flags, *crashing(1)) == EXIT_OK
    found = records(tmp_path / "out")
    assert all("reward/mean" not in record for record in found)
    assert "eval/broken/student/avg" in found[-1]
    assert json.loads((tmp_path / "out" / "scoreboard.json").read_text())["env"] == "broken"
