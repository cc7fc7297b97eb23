"""The monitors with their real packages, offline: what these have on disk after a resumed run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL
from support.monitor_files import tensorboard_data, trackio_rows, wandb_items, wandb_records
from support.runs import board, records, run

from minidistill.config import Config, load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.reporting.monitors import check_monitors, open_monitors

SECRET = "sk-very-secret-0123456789"
ROWS = [
    {
        "env": "e",
        "task_id": "eval/0",
        "prompt": "Hi | <b>\x1b[31m",
        "before": "one\ntwo",
        "teacher": "# three",
        "after": "four",
    }
]
BOARD = {"steps": 4, "gap_closed": 0.9, "verdict": "closed", "drift_kl": None, "per": {"e": 1.0}}


def config(tmp_path: Path, *flags: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return load_config([str(path), *flags]).config


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours: a package may log what it likes."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("minidistill")]


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"needs {package}, which is not installed")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)


def log_twice(config: Config, run_dir: Path) -> None:
    """Steps 1 to 3, of which 3 is lost; then a resumed run of steps 3 and 4."""
    check_monitors(config)
    monitor = open_monitors(config, run_dir)
    monitor.log(0, {"eval/heldout_kl": 2.0})
    monitor.samples(0, [{k: v for k, v in row.items() if k != "after"} for row in ROWS])
    for step in (1, 2, 3):
        monitor.log(step, {"teacher_kl": 1.0 / step, "combined_advantage": -0.5})
        monitor.log(step, {"eval/sokoban-env/student/avg": 0.1 * step})
    monitor.close(None)
    time.sleep(1.0 if config.wandb else 0.0)  # wandb names offline files by the second
    monitor = open_monitors(config, run_dir, first_step=3)
    for step in (3, 4):
        monitor.log(step, {"teacher_kl": 1.0 / step, "combined_advantage": float("nan")})
    monitor.samples(4, ROWS)
    monitor.close(BOARD)


def assert_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_wandb_offline(
    tmp_path: Path,
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    log_twice(config(tmp_path, "--wandb.offline", "--wandb.tags", '["a"]'), run_dir)
    assert warnings(caplog) == []
    assert capfd.readouterr().out == ""
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    saved_id = (run_dir / "wandb_id").read_text().strip()
    assert [file.name for file in files] == [f"run-{saved_id}.wandb"] * 2
    records = [record for file in files for record in wandb_records(file)]
    history = [wandb_items(r.history.item) for r in records if r.HasField("history")]
    by_step: dict[int, dict[str, Any]] = {}
    for row in history:
        by_step.setdefault(row["step"], {}).update(row)
    assert sorted(by_step) == [0, 1, 2, 3, 4]
    assert by_step[2]["teacher_kl"] == 0.5
    assert by_step[2]["combined_advantage"] == -0.5
    assert by_step[3]["eval/sokoban-env/student/avg"] == pytest.approx(0.3)
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["*"] == "step"
    for step, names in ((0, 3), (4, 4)):
        table = {name: by_step[step][f"samples/{name}"] for name in ("_type", "nrows", "ncols")}
        assert table == {"_type": "table-file", "nrows": 1, "ncols": names}
    media = [p for file in files for p in (file.parent / "files" / "media").rglob("*.json")]
    tables = [json.loads(path.read_text()) for path in media]
    full = next(table for table in tables if len(table["columns"]) == 4)
    assert full["columns"] == ["prompt", "before", "in context", "after"]
    assert full["data"] == [["Hi | <b>[31m", "one\ntwo", "# three", "four"]]
    [first, *_] = [r.run for r in records if r.HasField("run")]
    assert (first.run_id, first.display_name, list(first.tags)) == (saved_id, "a run", ["a"])
    logged = {u.key: json.loads(u.value_json) for u in first.config.update}
    assert logged["orchestrator"]["teacher_model"]["context"] == "Think."
    assert not first.git.remote_url
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= wandb_items(record.summary.update)
    assert summary["scoreboard/gap_closed"] == 0.9
    assert summary["scoreboard/per/e"] == 1.0
    assert "scoreboard/drift_kl" not in summary
    assert_no_secret(run_dir)


def test_a_lost_id_of_wandb_begins_a_new_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    monitor = open_monitors(config(tmp_path, "--wandb.offline"), tmp_path / "run")
    monitor.log(5, {"teacher_kl": 1.0})
    monitor.close(None)
    [warning] = warnings(caplog)
    assert "wandb_id has no id of a W&B run any more" in warning
    saved_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{saved_id}.wandb"))


def test_tensorboard(
    tmp_path: Path,
    secrets: None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    needs("tensorboard")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log_twice(config(tmp_path, "--tensorboard"), run_dir)
    assert warnings(caplog) == []
    assert capfd.readouterr().out == ""
    scalars, texts = tensorboard_data(run_dir / "tensorboard")
    assert scalars["teacher_kl"] == {s: pytest.approx(1 / s) for s in (1, 2, 3, 4)}
    assert scalars["eval/heldout_kl"] == {0: 2.0}
    # step 3 is repeated, and what the lost one had is gone
    assert sorted(scalars["eval/sokoban-env/student/avg"]) == [1, 2]
    assert scalars["scoreboard/gap_closed"] == {4: pytest.approx(0.9)}
    assert "scoreboard/drift_kl" not in {*scalars, *texts}
    assert texts["scoreboard/verdict"] == {4: "    closed"}
    assert sorted(texts["samples/0"]) == [0, 4]
    shown = texts["samples/0"][4]
    assert "**before**\n\n    one\n    two\n\n**in context**\n\n    # three" in shown
    assert "\x1b" not in shown
    assert '"context": "Think."' in texts["config"][2]
    assert_no_secret(run_dir)


def test_a_run_with_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    path = tmp_path / "run"
    assert run(path, "--tensorboard", "--max_steps", "2") == EXIT_OK
    scalars, texts = tensorboard_data(path / "tensorboard")
    recorded = {r["step"]: r["teacher_kl"] for r in records(path) if "teacher_kl" in r}
    assert scalars["teacher_kl"] == {s: pytest.approx(kl, rel=1e-6) for s, kl in recorded.items()}
    assert scalars["scoreboard/steps"] == {2: 2.0}
    kept = board(path)["completions"]
    assert {tag for tag in texts if tag.startswith("samples/")} == {
        f"samples/{number}" for number in range(len(kept))
    }
    first, last = texts["samples/0"][0], texts["samples/0"][2]
    assert "**in context**" in first
    assert "**after**" not in first
    assert f"**after**\n\n    {kept[0]['after'].splitlines()[0]}" in last


def test_trackio(
    tmp_path: Path,
    secrets: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    needs("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    kept = tmp_path / "kept"
    kept.mkdir()
    for module in (utils, storage):  # read from TRACKIO_DIR when it is imported
        for name, value in vars(module).copy().items():
            if isinstance(value, Path) and name == "TRACKIO_DIR":
                monkeypatch.setattr(module, name, kept)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("a", "b"):  # two runs whose directories have the same name
        run_dir = tmp_path / name / "run"
        run_dir.mkdir(parents=True)
        log_twice(config(tmp_path, "--trackio"), run_dir)
    assert warnings(caplog) == []
    assert capfd.readouterr().out == ""
    rows = trackio_rows(kept, "minidistill")
    saved_id = (tmp_path / "a" / "run" / "trackio_id").read_text().strip()
    assert {run for run, _, _ in rows} > {f"run-{saved_id}"}
    assert len({run for run, _, _ in rows}) == 2
    own = [(step, metrics) for run, step, metrics in rows if run == f"run-{saved_id}"]
    assert [(s, m["teacher_kl"]) for s, m in own if "teacher_kl" in m] == [
        (s, 1 / s) for s in (1, 2, 3, 3, 4)
    ]
    table = next(m["samples"] for s, m in own if s == 4 and "samples" in m)
    assert "in context" in json.dumps(table)
    assert "# three" in json.dumps(table)
    [board] = [m for s, m in own if "scoreboard/verdict" in m]
    assert board["scoreboard/gap_closed"] == 0.9
    assert_no_secret(kept)


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
@pytest.mark.parametrize("missing", ["absent", "only a folder of that name"])
def test_a_missing_package_names_its_extra(
    package: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(tmp_path, f"--{package}")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / package).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)] if missing != "absent" else [])
    sys.path_importer_cache.clear()
    with pytest.raises(UserError) as caught:
        check_monitors(chosen)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert caught.value.fix == (f"pip install 'minidistill[{package}]', or run with --no-{package}")


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_broken_package_is_refused(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(tmp_path, f"--{package}")
    for name in [name for name in sys.modules if package in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"{package} cannot be used") as caught:
        check_monitors(chosen)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert os.fspath(tmp_path) in sys.path[0]
