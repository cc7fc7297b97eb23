"""A disk that fails, or a kill, at any point of saving: a good checkpoint is always there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.disk_faults import at_call, failing, file_limit, killed, refusal, small_disk
from support.faults import write_fails
from support.lab import SMALL_STEP, Lab, make_lab
from support.paths import SOKOBAN
from support.ranks import NO_EVALUATION
from support.runs import board, records, run

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK
from minidistill.system.scratch import ScratchFolder
from minidistill.trainer import checkpoint
from minidistill.trainer.trainer import Trainer

SAVE = "step_000003"


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = make_lab(load_config([SOKOBAN, *SMALL_STEP]))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    return lab


@pytest.fixture(scope="module")
def saved(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2. Every weight is the step's number."""
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save(lab, root, step)
    return root


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where flushing takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


def save(lab: Lab, root: Path, step: int, keep: int = 2) -> None:
    for _, parameter in lab.policy.parameters:
        parameter.data.fill_(step)
    checkpoint.save(lab.trainer, root, step, {}, keep=keep)


def restored(lab: Lab, root: Path) -> int:
    """The step of the checkpoint that is restored, with its weights."""
    facts = checkpoint.restore(lab.trainer, root)
    assert facts is not None
    loaded = {float(x) for _, p in lab.policy.parameters for x in p.detach().unique()}
    assert loaded == {facts["step"]}
    return int(facts["step"])


def resumed(lab: Lab, root: Path, keep: int) -> int:
    """What a resumed run does to its checkpoints. Returns the step after which it resumes."""
    step = restored(lab, root)
    checkpoint.complete(root, step, keep)
    return step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.slow
def test_a_disk_that_fails_at_any_call(lab: Lab, saved: Path, memory: Path) -> None:
    """Exit code 3, nothing half-written, and the older checkpoints as they were."""
    refused_at = 0
    for number in range(1, 200):
        error = (errno.ENOSPC, errno.EDQUOT, errno.EIO)[number % 3]
        root = memory / str(number)
        shutil.copytree(saved, root)
        with failing(number, error) as calls:
            refused = refusal(partial(save, lab, root, 3))
        sealed = (root / SAVE).exists()
        if refused is None:
            # a checkpoint that is kept too long, or a part of it, is no reason to stop
            assert restored(lab, root) == 3
            save(lab, root, 4)
            assert names(root) == ["latest", SAVE, "step_000004"]
        else:
            refused_at = number
            assert refused.exit_code == EXIT_ENVIRONMENT
            assert refused.what.startswith(f"cannot write {root}/")
            assert refused.what.endswith(os.strerror(error))
            assert "--resume" in refused.fix
            assert names(root) == ["latest", "step_000001", "step_000002", *[SAVE] * sealed]
            assert restored(lab, root) == 2 + sealed
        shutil.rmtree(root)
        if len(calls) < number:
            break
    assert refused_at > 20
    assert len(calls) < number


@pytest.mark.slow
def test_a_kill_at_any_call(lab: Lab, saved: Path, memory: Path) -> None:
    """Also while a checkpoint of the same step, which was refused, is replaced."""
    for replaced in (False, True):
        for number in range(1 + replaced, 200):
            root = memory / f"{replaced}-{number}"
            shutil.copytree(saved, root)
            if replaced:
                shutil.copytree(root / "step_000002", root / SAVE)  # it says that it is of step 2
            ended = not killed(number, partial(save, lab, root, 3))
            assert restored(lab, root) in (2, 3)
            assert not [n for n in names(root) if n.startswith(".") or n.endswith(".tmp")]
            save(lab, root, 4)
            assert (names(root)[0], names(root)[-1]) == ("latest", "step_000004")
            assert len(names(root)) == 3
            shutil.rmtree(root)
            if ended:
                break
        assert ended
        assert number > 20


def test_a_kill_before_old_checkpoints_are_removed(lab: Lab, saved: Path, memory: Path) -> None:
    """A resume points `latest` at the new one and removes the others, also if it is killed too."""
    root = memory / "whole"
    shutil.copytree(saved, root)
    with at_call(0, lambda: None) as calls:
        save(lab, root, 3, keep=1)
    there = len(calls) - calls[::-1].index("replace")  # the call that writes `latest`
    states = set()
    for number in range(there - 2, len(calls) + 2):
        root = memory / str(number)
        shutil.copytree(saved, root)
        ended = not killed(number, partial(save, lab, root, 3, keep=1))
        states.add(((root / "latest").read_text().strip(), len(names(root))))
        for again in range(1, 99, 2) if number == there else ():
            if not killed(again, partial(resumed, lab, root, keep=1)):
                break
        assert resumed(lab, root, keep=1) == 3
        assert names(root) == ["latest", SAVE]
        assert (root / "latest").read_text() == f"{SAVE}\n"
        assert ended == (number > len(calls))
    # with `latest`, and with what is being removed
    assert states == {("step_000002", 5), ("step_000002", 4), (SAVE, 4), (SAVE, 3), (SAVE, 2)}


def test_a_damaged_newest_checkpoint_costs_no_older_one(
    lab: Lab, saved: Path, memory: Path
) -> None:
    root = memory / "root"
    shutil.copytree(saved, root)
    save(lab, root, 3, keep=9)
    save(lab, root, 4, keep=9)
    before = names(root)
    os.truncate(root / "step_000004" / "state.safetensors", 100)
    assert resumed(lab, root, keep=1) == 3
    assert names(root) == before


def test_a_run_that_is_killed_there_has_no_checkpoint_too_many_after_a_resume(
    tmp_path: Path,
) -> None:
    flags = (*NO_EVALUATION, "--max_steps", "2", "--ckpt.interval", "1", "--ckpt.keep", "1")
    whole, path = tmp_path / "whole", tmp_path / "run"
    with write_fails(whole, 0, kills=True) as fault:
        assert run(whole, *flags) == EXIT_OK
    there = fault.log.index("os.rename checkpoints/.step_000001.removed") + 1
    with write_fails(path, there, kills=True):
        run(path, *flags)
    assert names(path / "checkpoints") == ["latest", "step_000001", "step_000002"]
    assert run(path, *flags, "--resume") == EXIT_OK
    assert names(path / "checkpoints") == names(whole / "checkpoints") == ["latest", "step_000002"]


def test_a_folder_that_is_replaced_is_never_lost(lab: Lab, memory: Path) -> None:
    """Killed between the two renames, the old one comes back."""
    folder = checkpoint.save_model(lab.policy, memory)
    before = load_file(folder / "adapter_model.safetensors")
    seen = set()
    for number in range(1, 99):
        ended = not killed(number, lambda: checkpoint.save_model(lab.policy, memory))
        old = memory / ".adapter.old"
        seen.add((folder.exists(), old.exists()))
        assert folder.exists() or old.exists()
        kept = folder if folder.exists() else old
        after = load_file(kept / "adapter_model.safetensors")
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert checkpoint.save_model(lab.policy, memory) == folder
        assert not old.exists()
        for path in memory.glob("adapter.*.tmp"):
            shutil.rmtree(path)
        if ended:
            break
    assert seen == {(True, False), (False, True), (True, True)}


def test_files_that_may_not_grow(lab: Lab, saved: Path, tmp_path: Path) -> None:
    """At any size, also in the middle of a write of safetensors."""
    shutil.copytree(saved, tmp_path / "root")
    root, before = tmp_path / "root", names(saved)
    largest = max(p.stat().st_size for p in root.rglob("*") if p.is_file())
    for size in range(0, largest, largest // 40):
        with file_limit(size):
            refused = refusal(partial(save, lab, root, 3))
        assert refused is not None
        assert refused.exit_code == EXIT_ENVIRONMENT
        assert names(root) == before
    assert restored(lab, root) == 2
    save(lab, root, 3)
    assert restored(lab, root) == 3


def test_a_disk_that_is_full_at_any_size(lab: Lab, saved: Path, tmp_path: Path) -> None:
    used = sum(-(-p.stat().st_size // 4096) * 4096 for p in saved.rglob("*"))
    refusals = 0
    with small_disk(tmp_path / "disk") as resize:
        root = tmp_path / "disk/root"
        shutil.copytree(saved, root)
        for more in range(0, used, used // 24):
            resize(used + more)
            refused = refusal(partial(save, lab, root, 3))
            if refused is None:
                break
            refusals += 1
            assert refused.exit_code == EXIT_ENVIRONMENT
            assert "No space left on device" in refused.what
            assert f"on the disk of {root}" in refused.fix
            sealed = [SAVE] * (root / SAVE).exists()  # and only `latest` had no room
            assert names(root) == ["latest", "step_000001", "step_000002", *sealed]
            assert restored(lab, root) == 2 + len(sealed)
        assert restored(lab, root) == 3
        assert names(root) == ["latest", "step_000002", SAVE]
    assert refusals > 5


def test_a_run_that_the_disk_stopped_resumes_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*NO_EVALUATION, "--max_steps", "2", "--ckpt.interval", "1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, *flags) == EXIT_OK
    saved = checkpoint.save

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_on_a_full_disk(trainer: Trainer, root: Path, step: int, *rest: Any) -> Path:
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr(os, "fsync", full)
            return saved(trainer, root, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_on_a_full_disk)
        assert run(cut, *flags) == EXIT_ENVIRONMENT
    assert names(cut / "checkpoints") == ["latest", "step_000001"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = ScratchFolder()
    assert dead._lock is not None
    os.close(dead._lock)  # as the kernel does when a run is killed
    dead._lock = None
    (cut / "env.json.0123abcd.tmp").write_text("half")
    assert run(cut, *flags, "--resume") == EXIT_OK
    assert not dead.path.exists()
    assert records(cut) == records(whole)
    assert board(cut) == board(whole)
    for path in (whole / "adapter").iterdir():
        assert path.read_bytes() == (cut / "adapter" / path.name).read_bytes()
    assert not list(cut.rglob("*.tmp"))
