"""Damaged checkpoints: every kind is named and skipped, and nothing of it is loaded or opened."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lab import SMALL_STEP, Lab, make_lab
from support.paths import SOKOBAN
from torch import Tensor

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.trainer import checkpoint
from minidistill.trainer.checkpoint_files import MANIFEST, STATE, TENSORS, seal


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = make_lab(load_config([SOKOBAN, *SMALL_STEP]))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    return lab


@pytest.fixture(scope="module")
def saved(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        fill(lab, step)
        checkpoint.save(lab.trainer, root, step, {}, keep=2)
    return root


@pytest.fixture
def root(lab: Lab, saved: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2. Every weight is the step's number; the lab's are 9."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    fill(lab, 9)
    return tmp_path / "checkpoints"


def fill(lab: Lab, value: float) -> None:
    for _, parameter in lab.policy.parameters:
        parameter.data.fill_(value)


def weights(lab: Lab) -> set[float]:
    return {float(x) for _, p in lab.policy.parameters for x in p.detach().unique()}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# -- what is damage --------------------------------------------------------------------------------

Spoil = Callable[[Path], Any]


def tensors(change: Callable[[dict[str, Tensor]], Any], *, count: bool = True) -> Spoil:
    """Change the tensors. The manifest then has the right sums, and the right `count` of them."""

    def spoil(path: Path) -> None:
        state = load_file(path / TENSORS)
        change(state)
        save_file(state, path / TENSORS)
        before = json.loads((path / MANIFEST).read_text())["tensors"]
        (path / MANIFEST).unlink()
        seal(path, len(state) if count else before)

    return spoil


def content(file: str, data: bytes) -> Spoil:
    """Other bytes in a file, of which the manifest has the right sums."""

    def spoil(path: Path) -> None:
        (path / file).write_bytes(data)
        (path / MANIFEST).unlink()
        seal(path, 0)

    return spoil


def manifest(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(path: Path) -> None:
        value = json.loads((path / MANIFEST).read_text())
        change(value)
        (path / MANIFEST).write_text(json.dumps(value))

    return spoil


def instead(file: str, make: Callable[[Path], Any]) -> Spoil:
    """Something else in a file's place."""

    def spoil(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return spoil


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def link_to_a_copy(path: Path) -> None:
    shutil.copytree(path, path.parent / "copy")
    shutil.rmtree(path)
    path.symlink_to("copy")


def link_to_the_adapter(path: Path) -> None:
    (path / "adapter").rename(path.parent / "adapter")
    (path / "adapter").symlink_to("../adapter")


def first(state: dict[str, Tensor], prefix: str) -> str:
    return next(name for name in sorted(state) if name.startswith(prefix))


def without(prefix: str, *, all_of_them: bool = False) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        found = [name for name in sorted(state) if name.startswith(prefix)]
        for name in found if all_of_them else found[:1]:
            del state[name]

    return change


def replaced(prefix: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        name = first(state, prefix)
        state[name] = make(state[name]).contiguous()

    return change


def without_one_parameter(state: dict[str, Tensor]) -> None:
    parameter = first(state, "optimizer/step/").removeprefix("optimizer/step/")
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        del state[f"optimizer/{kind}/{parameter}"]


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return make


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
WEIGHTS, MOMENTS = "policy/student/", "optimizer/exp_avg/"
DAMAGE: dict[str, tuple[Spoil, str]] = {
    "no tensors": (tensors(dict.clear), "lacks policy/student"),
    "a weight is missing": (tensors(without(WEIGHTS)), "lacks policy/student"),
    "no moments": (tensors(without("optimizer/", all_of_them=True)), "has no moments"),
    "a moment is missing": (tensors(without(MOMENTS)), "lacks a part of the moments"),
    "one kind of moments": (
        tensors(without(MOMENTS, all_of_them=True)), "lacks a part of the moments"),
    "no step counts": (
        tensors(without("optimizer/step/", all_of_them=True)), "lacks a part of the moments"),
    "a parameter's moments": (tensors(without_one_parameter, count=False), "tensors, not"),
    "a tensor too many": (
        tensors(lambda s: s.update(x=torch.zeros(1))), "has x, which this run does not have"),
    "moments of nothing": (
        tensors(lambda s: s.update({f"{MOMENTS}x": torch.zeros(1)})), "exp_avg/x, which"),
    "another shape": (tensors(replaced(WEIGHTS, lambda t: t[:1])), "not F32"),
    "transposed": (tensors(replaced(WEIGHTS, lambda t: t.t())), "not F32"),
    "a moment's shape": (tensors(replaced(MOMENTS, lambda t: t.flatten())), "not F32"),
    "another dtype": (tensors(replaced(WEIGHTS, Tensor.half)), "is F16"),
    "a moment's dtype": (tensors(replaced(MOMENTS, Tensor.double)), "is F64"),
    "a step count's dtype": (tensors(replaced("optimizer/step/", Tensor.long)), "is I64"),
    "NaN": (tensors(replaced(WEIGHTS, set_first(float("nan")))), "not finite"),
    "infinity": (tensors(replaced(WEIGHTS, set_first(float("-inf")))), "not finite"),
    "NaN in a moment": (tensors(replaced(MOMENTS, set_first(float("nan")))), "not finite"),
    "a header that claims 4 TB": (content(TENSORS, header(HUGE)), f"{TENSORS}: "),
    "a header of 2^63 bytes": (content(TENSORS, header(b"{}", 1 << 63)), f"{TENSORS}: "),
    "a header of 90 MB": (content(TENSORS, header(b"{}", 90 << 20)), f"{TENSORS}: "),
    "no header": (content(TENSORS, b""), f"{TENSORS}: "),
    "a pickle": (content(TENSORS, b"\x80\x04cos\nsystem\n."), f"{TENSORS}: "),
    "text": (content(TENSORS, b"version https://git-lfs.example\n"), f"{TENSORS}: "),
    "cut off": (lambda p: os.truncate(p / TENSORS, 1000), "has 1000 bytes, not"),
    "zeroed": (
        lambda p: (p / TENSORS).write_bytes(bytes((p / TENSORS).stat().st_size)),
        "another checksum"),
    "missing": (lambda p: (p / TENSORS).unlink(), f"{TENSORS} is missing"),
    "the adapter is missing": (lambda p: shutil.rmtree(p / "adapter"), "is missing"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "an empty folder": (make_empty, f"{MANIFEST} is missing"),
    "half a manifest": (lambda p: os.truncate(p / MANIFEST, 90), f"{MANIFEST}: "),
    "an empty manifest": (lambda p: os.truncate(p / MANIFEST, 0), f"{MANIFEST}: "),
    "a nested manifest": (
        lambda p: (p / MANIFEST).write_text("[" * 100_000), f"{MANIFEST}: "),
    "a manifest that is no text": (
        lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe\0"), f"{MANIFEST}: "),
    "a manifest of 1 TB": (lambda p: os.truncate(p / MANIFEST, 1 << 40), "is too large"),
    "a list as a manifest": (lambda p: (p / MANIFEST).write_text("[]"), "no JSON object"),
    "a manifest of nothing": (lambda p: (p / MANIFEST).write_text("{}"), "lists no files"),
    "no sums": (manifest(lambda m: m.update(sha256={})), f"does not list {STATE}"),
    "sums that are a list": (manifest(lambda m: m.update(sha256=[TENSORS])), "lists no files"),
    "sizes that are a text": (manifest(lambda m: m.update(bytes="x")), "lists no files"),
    "a sum that is no text": (manifest(lambda m: m["sha256"].update({STATE: 1})), "checksum"),
    "a path upwards": (
        manifest(lambda m: m["sha256"].update({"../step_000001/state.json": "x"})), "is outside"),
    "a path from the root": (
        manifest(lambda m: m["sha256"].update({"/etc/passwd": "x"})), "is outside"),
    "an empty path": (manifest(lambda m: m["sha256"].update({"": "x"})), "is outside"),
    "a path with a lone surrogate": (
        manifest(lambda m: m["sha256"].update({"a\ud800": "x"})), "is no name that a file can have",
    ),
    "a path with a null": (manifest(lambda m: m["sha256"].update({"a\0": "x"})), "is outside"),
    "a path too long": (
        manifest(lambda m: m["sha256"].update({"a" * 5000: "x"})), "cannot be read"),
    "a folder is listed": (
        manifest(lambda m: m["sha256"].update({"adapter": "x"})), "adapter is not a file"),
    "a device is listed by a link": (
        instead(TENSORS, lambda f: f.symlink_to("/dev/zero")), f"{TENSORS} is a link"),
    "a link outside": (
        instead(STATE, lambda f: f.symlink_to("../step_000001/state.json")), f"{STATE} is a link"),
    "a manifest by a link": (
        instead(MANIFEST, lambda f: f.symlink_to("/dev/zero")), f"{MANIFEST} is a link"),
    "a folder by a link": (link_to_the_adapter, "adapter is a link"),
    "the checkpoint by a link": (link_to_a_copy, "step_000002 is a link"),
    "tensors in a pipe": (instead(TENSORS, os.mkfifo), f"{TENSORS} is not a file"),
    "a state in a pipe": (instead(STATE, os.mkfifo), f"{STATE} is not a file"),
    "a manifest in a pipe": (instead(MANIFEST, os.mkfifo), f"{MANIFEST} is not a file"),
    "a socket": (instead(TENSORS, bind), f"{TENSORS} is not a file"),
    "another format, by a bit": (
        lambda p: (p / STATE).write_text((p / STATE).read_text().replace(": 1", ": 9", 1)),
        f"{STATE} has another checksum"),
    "half a state": (content(STATE, b'{"format": 1, "st'), f"{STATE}: "),
    "no state": (content(STATE, b""), f"{STATE}: "),
    "a state of another step": (content(STATE, b'{"format": 1, "step": 1}'), "is of step 1"),
    "a state of no step": (content(STATE, b'{"format": 1}'), "is of step None"),
    "a state of step true": (content(STATE, b'{"format": 1, "step": true}'), "is of step True"),
    "a state of step 2.0": (content(STATE, b'{"format": 1, "step": 2.0}'), "is of step 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_restored(
    lab: Lab, root: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    spoil, words = DAMAGE[kind]
    newest = root / "step_000002"
    spoil(newest)
    facts = checkpoint.restore(lab.trainer, root)
    assert facts is not None
    assert facts["step"] == 1
    assert weights(lab) == {1.0}
    (message,) = caplog.messages
    assert message.startswith("checkpoint step_000002 is damaged (")
    assert words in message
    # alone it is refused, and nothing of it is loaded
    fill(lab, 9)
    shutil.rmtree(root / "step_000001")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(step_") as caught:
        checkpoint.restore(lab.trainer, root)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert words in caught.value.what
    assert weights(lab) == {9.0}
    assert os.path.lexists(newest)


def test_facts_that_disagree_are_damage(
    lab: Lab, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def agrees(facts: dict[str, Any]) -> str | None:
        asked.append(facts["step"])
        return "metrics.jsonl is shorter" if facts["step"] == 2 else None

    facts = checkpoint.restore(lab.trainer, root, agrees)
    assert facts is not None
    assert facts["step"] == 1
    assert asked == [2, 1]
    assert caplog.messages == [
        "checkpoint step_000002 is damaged (metrics.jsonl is shorter): using the one before"
    ]
    with pytest.raises(UserError) as caught:
        checkpoint.restore(lab.trainer, root, lambda facts: f"no {facts['step']}")
    assert "(step_000002: no 2; step_000001: no 1)" in caught.value.what


# -- order, names, and what is kept ----------------------------------------------------------------


def save(lab: Lab, root: Path, step: int, keep: int) -> None:
    fill(lab, step)
    checkpoint.save(lab.trainer, root, step, {}, keep=keep)
    fill(lab, 9)


def test_checkpoints_are_ordered_by_number(lab: Lab, tmp_path: Path) -> None:
    for step in (1, 999_998, 999_999, 1_000_000, 1_000_001):
        save(lab, tmp_path, step, keep=3)
    assert names(tmp_path) == ["latest", "step_1000000", "step_1000001", "step_999999"]
    assert (tmp_path / "latest").read_text() == "step_1000001\n"
    facts = checkpoint.restore(lab.trainer, tmp_path)
    assert facts is not None
    assert facts["step"] == 1_000_001
    assert weights(lab) == {1_000_001.0}


FOLDERS = ("step_abc", "step_", "step_5", "step_5 (copy)", "step_000005 (copy)", "step_000005.bak",
           "step_0000005", "step_-00005", "step_00000٥", "step_" + "9" * 200 + "x", "old", ".step",
           "step_000003.damaged", "Step_000009", "step_000009_", ".snapshot")  # fmt: skip
FILES = ("step_000007", ".nfs000000000012", "latest~", ".latest.swp", "#latest#", "step_000001.tgz",
         "notes.tmp", ".DS_Store")  # fmt: skip


def test_unknown_names_are_left_alone(
    lab: Lab, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in FOLDERS:
        shutil.copytree(root / "step_000001", root / name)
    for name in FILES:
        (root / name).write_text("mine")
    (root / "step_000008").symlink_to("nowhere")
    os.mkfifo(root / "step_000006")
    mine = {*FOLDERS, *FILES, "step_000008", "step_000006"}
    assert checkpoint.restore(lab.trainer, root) == {"format": 1, "step": 2}
    save(lab, root, 3, keep=1)
    assert set(names(root)) == mine | {"latest", "step_000003"}
    assert all((root / name / STATE).exists() for name in FOLDERS)
    assert caplog.messages == []


def test_good_checkpoints_are_counted(lab: Lab, root: Path) -> None:
    """A damaged one is not, and takes no good one's place."""
    for step in (3, 4, 5):
        save(lab, root, step, keep=9)
    os.truncate(root / "step_000004" / TENSORS, 1000)
    (root / "step_000003" / MANIFEST).unlink()
    save(lab, root, 6, keep=3)
    assert names(root) == ["latest", *(f"step_00000{n}" for n in (2, 3, 4, 5, 6))]
    save(lab, root, 7, keep=3)
    assert names(root) == ["latest", *(f"step_00000{n}" for n in (5, 6, 7))]


def test_refused_newer_checkpoints_go_when_the_run_has_passed_them_by(lab: Lab, root: Path) -> None:
    """They are of steps that a resumed run repeats. No good older one goes instead."""
    save(lab, root, 9, keep=9)
    (root / "step_000009" / TENSORS).write_bytes(b"damaged")
    facts = checkpoint.restore(lab.trainer, root)
    assert facts is not None
    assert facts["step"] == 2
    save(lab, root, 3, keep=2)
    assert names(root) == ["latest", "step_000002", "step_000003"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(lab: Lab, root: Path, value: float) -> None:
    before = names(root)
    fill(lab, value)
    with pytest.raises(UserError, match="not finite") as caught:
        checkpoint.save(lab.trainer, root, 3, {}, keep=1)
    assert caught.value.exit_code == EXIT_HEALTH
    assert names(root) == before
    assert checkpoint.restore(lab.trainer, root) == {"format": 1, "step": 2}
