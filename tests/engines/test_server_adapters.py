"""The files of the adapters that servers read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.disk_faults import file_limit
from support.lab import SMALL_STEP, make_lab
from support.paths import SOKOBAN

from minidistill.config import load_config
from minidistill.config.engine_kinds import SERVER
from minidistill.engines.server.adapters import Adapters
from minidistill.engines.server.engine import start
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.placement import EnginePlacement
from minidistill.trainer.policy import Policy, Weights


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_lab(load_config([SOKOBAN, *SMALL_STEP])).policy


@pytest.mark.parametrize("size", [0, 2000, 30_000])
def test_an_adapter_that_cannot_be_written_leaves_nothing(
    policy: Policy, tmp_path: Path, size: int
) -> None:
    adapters = Adapters(tmp_path / "sync")
    with file_limit(size), pytest.raises(UserError, match=r"cannot write .*student-v1") as caught:
        adapters.write(policy, Weights.STUDENT, 1)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert list((tmp_path / "sync").iterdir()) == []
    assert adapters.write(policy, Weights.STUDENT, 1).path.is_dir()
    adapters.delete()
    assert not (tmp_path / "sync").exists()


def test_servers_that_share_a_folder_delete_their_own(policy: Policy, tmp_path: Path) -> None:
    one, other = Adapters(tmp_path / "sync"), Adapters(tmp_path / "sync")
    one.write(policy, Weights.STUDENT, 1)
    kept = other.write(policy, Weights.STUDENT, 1)
    one.delete()
    assert list((tmp_path / "sync").iterdir()) == [kept.path]
    other.delete()
    assert not (tmp_path / "sync").exists()


def test_adapters_of_a_killed_run_are_removed(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sync"
    Adapters(folder).write(policy, Weights.STUDENT, 7)
    (folder / "notes").write_text("mine")
    monkeypatch.setattr("minidistill.engines.server.engine.server_command", lambda *a, **k: "")
    servers = EnginePlacement(SERVER, "model", None)
    assert start(servers, load_config([SOKOBAN]).config, folder, teacher=False) == []
    assert [path.name for path in folder.iterdir()] == ["notes"]
