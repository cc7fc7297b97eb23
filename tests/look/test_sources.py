"""What RUN, ADAPTER and MODEL name, and what is refused, each with one clear error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidistill.cli import main
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.export.source import open_run, open_source
from minidistill.look.model import load
from minidistill.system.run_folders import no_run
from minidistill.types import Role


def unfinish(run: Path) -> Path:
    """As a run in progress: no scoreboard and no adapter yet."""
    (run / "scoreboard.json").unlink()
    shutil.rmtree(run / "adapter")
    return run


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def refusal(name: Path | str, **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(open_source(str(name), **more))
    return caught.value


def test_a_finished_run_has_its_adapter(finished: Path) -> None:
    source = open_source(str(finished))
    assert (source.weights, source.checkpoint) == (finished / "adapter", None)
    assert source.kind == "run"
    assert source.board


def test_a_run_in_progress_has_its_newest_checkpoint(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = unfinish(finished) / "checkpoints"
    source = open_run(finished)
    assert (source.weights, source.checkpoint) == (checkpoints / "step_000003" / "adapter", 3)
    newest = source.weights / "adapter_model.safetensors"
    policy = load(source).policy
    saved = load_file(newest)
    loaded = {
        f"base_model.model.{n}": p for n, p in policy.adapter(policy.weights_of(Role.STUDENT))
    }
    loaded = {n.replace("base_model.model.base_model.model", "base_model.model"): p
              for n, p in loaded.items()}  # fmt: skip
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert main(["chat", str(finished), "--ask", "Hi"]) == 0
    assert "has not finished: its checkpoint of step 3" in capsys.readouterr().err
    flip(newest)
    source = open_run(finished)
    assert (source.weights, source.checkpoint) == (checkpoints / "step_000002" / "adapter", 2)


def test_an_extended_run_has_its_newest_checkpoint(finished: Path) -> None:
    """It goes on, and the adapter is that of its first end."""
    (finished / "scoreboard.json").unlink()
    assert open_run(finished).checkpoint == 3


def test_a_checkpoint_that_a_run_in_progress_removes(finished: Path) -> None:
    source = open_source(str(unfinish(finished)))
    shutil.rmtree(source.weights.parent)
    with pytest.raises(UserError, match="has been removed while it was read") as caught:
        load(source)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "later checkpoints" in caught.value.fix


def test_damaged_checkpoints(finished: Path) -> None:
    unfinish(finished)
    for step in (2, 3):
        flip(finished / f"checkpoints/step_00000{step}/adapter/adapter_model.safetensors")
    error = refusal(finished)
    assert error.exit_code == EXIT_ENVIRONMENT
    assert "every checkpoint" in error.what
    assert "step_000003 is damaged" in error.what


def test_a_run_without_a_checkpoint(finished: Path) -> None:
    shutil.rmtree(unfinish(finished) / "checkpoints")
    assert "has saved no checkpoint yet" in refusal(finished).what


def damage(adapter: Path, how: str) -> None:
    file, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if how == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "gone":
        file.unlink()
    elif how == "no JSON":
        settings.write_text("{")
    else:
        tensors = load_file(file)
        name = next(iter(tensors))
        if how == "nan":
            tensors[name][0, 0] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("half", "cannot read the adapter"),
        ("gone", "there is no adapter in"),
        ("no JSON", "not valid JSON"),
        ("nan", "has values that are not finite"),
        ("lacks one", "the adapter lacks base_model.model"),
    ],
)
@pytest.mark.parametrize("named", ["run", "adapter"])
def test_damaged_adapters(far: Path, named: str, how: str, what: str) -> None:
    damage(far / "adapter", how)
    error = refusal(far if named == "run" else far / "adapter")
    assert what in error.what
    assert error.exit_code == EXIT_USAGE
    assert str(far) in error.where + error.what
    assert error.fix


def test_another_base(far: Path, caplog: pytest.LogCaptureFixture) -> None:
    error = refusal(far / "adapter", base="tiny-lake")
    assert "lacks" in error.what or "has the shape" in error.what or "for which" in error.what
    assert error.where == str(far / "adapter")
    assert "--base" in error.fix
    assert "names" in caplog.text
    assert "--base is tiny-lake" in caplog.text
    with pytest.raises(UserError, match="is a run, which says itself what its base is"):
        open_source(str(far), base="tiny-lake")


def test_a_base_that_is_not_known(far: Path) -> None:
    file = far / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for none in (None, "../a\0b"):
        file.write_text(json.dumps(settings | {"base_model_name_or_path": none}))
        assert "does not say what model it is for" in refusal(far / "adapter").what
    assert open_source(str(far / "adapter"), base="tiny-sokoban").base == "tiny-sokoban"
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/tiny_sokoban"}))
    error = refusal(far / "adapter")
    assert "cannot load the model '/gone/tiny_sokoban'" in error.what
    assert error.where == "--base"


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "there is no run, adapter or model" in refusal(tmp_path / "none").what
    assert "holds no run, no adapter and no model" in refusal(tmp_path).what
    (tmp_path / "config.resolved.json").write_text("{}")
    assert "is not a run directory" in refusal(tmp_path).what


def test_contexts(far: Path, tmp_path: Path) -> None:
    file = tmp_path / "persona.txt"
    file.write_text("Be a pirate.\n\n")
    for given, text in ((str(file), "Be a pirate.\n\n"), ("Be short. ", "Be short. ")):
        config = open_source(str(far), context=given).config
        assert config.orchestrator.teacher_model.context == text
    file.write_text(" \n")
    for empty in (str(file), ""):
        with pytest.raises(UserError, match=r"the context .*is empty"):
            open_source(str(far), context=empty)


def test_a_run_that_may_be_meant(
    far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    for name in ("pirate", "sokoban"):
        (runs / name / "checkpoints").mkdir(parents=True)
        (runs / name / "config.toml").touch()
    (tmp_path / "bare").mkdir()
    os.utime(runs / "pirate" / "config.toml", (1, 1))
    monkeypatch.chdir(tmp_path)
    error = refusal("runs/pirat")  # it could be a hub's id, but the folder holds runs
    assert error.what == "there is no run, adapter or model in runs/pirat"
    assert error.fix == "did you mean runs/pirate?"
    assert refusal("runs").fix == "name a run; there are runs/sokoban, runs/pirate"
    for name, fix in (
        ("runs/nothing-like", "name a run; there are runs/sokoban, runs/pirate"),
        ("runs/pirate/checkpoints", "did you mean runs/pirate?"),
        ("bare/runs", "give it"),
    ):
        assert no_run(Path(name), "give it").fix == fix
    for count in range(6):
        (runs / f"more-{count}").mkdir()
        (runs / f"more-{count}" / "config.toml").touch()
    assert refusal("runs").fix.endswith(", …")


def test_a_file_of_a_context_that_is_not_there_is_no_context(far: Path, tmp_path: Path) -> None:
    for missing in ("persona.txt", str(tmp_path / "none"), "~nobody-here/persona.md"):
        with pytest.raises(UserError, match="there is no file"):
            open_source(str(far), context=missing)
    with pytest.raises(UserError, match="is a folder"):
        open_source(str(far), context=str(tmp_path))
    text = "~nobody-here says: be brief"
    config = open_source(str(far), context=text).config
    assert config.orchestrator.teacher_model.context == text
