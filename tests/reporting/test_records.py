"""What a checkpoint counts on: compared, repaired from, or refused with what is missing."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.recorded_run import FIRST, LAST, Run, flipped, lost, train

from minidistill.errors import UserError
from minidistill.reporting.records import METRICS, REMOVED, SUMS, Records, rollout_names
from minidistill.reporting.run_directory import RunDirectory


def test_checkpoints_count_on_every_record(run: Run) -> None:
    assert [run.disagreement(step) for step in (2, 4, 6)] == [None] * 3
    counted = run.saved["4"]["records"]
    for name, lines in ((METRICS, 5), (SUMS, 10)):
        data = (run.path / name).read_bytes()[: counted[name]["size"]]
        assert data.count(b"\n") == counted[name]["lines"] == lines
        assert hashlib.sha256(data).hexdigest() == counted[name]["sha256"]
    assert run.saved["4"]["metrics_lines"] == 5  # for older versions
    assert subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=run.path).returncode == 0


def test_everything_is_on_disk_before_a_checkpoint_counts_on_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def recorded(descriptor: int) -> None:
        flushed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), run.path))

    directory = run.rewind(6)
    directory.log(7, {"loss": 1.0})
    monkeypatch.setattr(os, "fsync", recorded)
    directory.records.flush()
    assert flushed == [METRICS, SUMS, "rollouts", "."]


def test_saving_reads_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a long run costs what one of a short run does."""
    directory = run.rewind(6)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", None)
        patch.setattr(hashlib, "file_digest", None)
        for step in range(7, 60):
            directory.log(step, {"loss": 1.0})
            directory.records.add(dict.fromkeys(rollout_names(step), "0" * 64))
        counted = directory.records.flush()["records"]
    for name in (METRICS, SUMS):
        data = (run.path / name).read_bytes()
        assert counted[name] == {
            "lines": data.count(b"\n"),
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_is_rewound_and_repeated_is_the_same(run: Run, step: int) -> None:
    before = run.contents()
    directory = run.rewind(step)
    assert len((run.path / METRICS).read_bytes().splitlines()) == step + 1
    files = sorted(p.name for p in (run.path / "rollouts").iterdir())
    assert files[-1] == f"step_{step:06d}.safetensors"
    assert len(files) == 2 * step
    saved = train(directory, step + 1)
    assert saved[6] == run.saved["6"] | {"step": 6}
    assert run.contents() == before


def test_a_rewind_to_the_start_keeps_the_baseline(run: Run) -> None:
    directory = RunDirectory(run.path)
    directory.records.rewind(None)
    assert sorted(run.contents()) == [SUMS, "baseline.json", "env.json", METRICS]
    assert (run.path / METRICS).read_bytes() == b""
    directory.log(0, {"eval": 1.0})
    assert train(directory, 1)[6] == run.saved["6"]


SHORT = [
    ("one record less", lambda d: d[: d.rindex(b'{"step": 6')], "has 6 of 7 lines"),
    ("torn in the last record", lambda d: d[:-9], "has 6 of 7 lines"),
    ("zeros for the last record", lambda d: d[:-20] + bytes(20), "has 6 of 7 lines"),
    ("a bit in the last record", lambda d: flipped(d, len(d) - 9), "line 7 of metrics.jsonl is"),
    ("half of it", lambda d: d[: d.index(b'{"step": 5') + 3], "has 5 of 7 lines"),
]
"""Damage after step 4: what was lost is repeated from there."""
DEEP = [
    ("lost", lost, "has 0 of 7 lines"),
    ("empty", lambda d: b"", "has 0 of 7 lines"),
    ("zeros", lambda d: bytes(len(d)), "has 0 of 7 lines"),
    ("noise", lambda d: b"\xff\xfe\n" * 90, "line 1 of metrics.jsonl is damaged"),
    ("a list", lambda d: d.replace(b'{"step": 1', b'["step", 1]#', 1), "line 2 of "),
    ("a text for a step", lambda d: d.replace(b'"step": 1', b'"step":"1"', 1), "line 2 of "),
    ("a digit of the first step", lambda d: d.replace(b"0.25", b"0.26"), "another checksum"),
    (
        "a record twice",
        lambda d: d.replace(b'{"step": 1', b'{"step": 0}\n{"step": 1', 1),
        "another",
    ),
]


@pytest.mark.parametrize(("change", "problem"), [c[1:] for c in SHORT], ids=[c[0] for c in SHORT])
def test_metrics_that_lost_their_end_are_repaired_from_an_older_checkpoint(
    run: Run, change: Any, problem: str
) -> None:
    before = run.contents()
    run.change(METRICS, change)
    assert problem in (run.disagreement(6) or "")
    assert run.disagreement(4) is None
    train(run.rewind(4), 5)
    assert run.contents() == before


@pytest.mark.parametrize(("change", "problem"), [c[1:] for c in DEEP], ids=[c[0] for c in DEEP])
def test_metrics_that_no_checkpoint_agrees_with_are_refused(
    run: Run, change: Any, problem: str
) -> None:
    run.change(METRICS, change)
    assert problem in (run.disagreement(6) or "")
    assert all(run.disagreement(step) for step in (2, 4))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lost, "is missing and rollouts/removed.txt does not name it"),
        (lambda d: b"", "is damaged"),
        (lambda d: bytes(len(d)), "is damaged"),
        (lambda d: d[: len(d) // 2], "is damaged"),
        (lambda d: flipped(d, 3), "is damaged"),
        (lambda d: d + b"\n", "is damaged"),
    ],
    ids=["lost", "empty", "zeros", "half", "a bit", "longer"],
)
@pytest.mark.parametrize("name", [FIRST, LAST, "baseline.json", "env.json"])
def test_a_damaged_file_is_named_by_every_checkpoint_that_counts_on_it(
    run: Run, name: str, change: Any, problem: str
) -> None:
    before = run.contents()
    run.change(name, change)
    if not name.startswith("rollouts"):
        problem = problem.partition(" and ")[0]
    assert run.disagreement(6) == f"{name} {problem}"
    if name != LAST:
        assert run.disagreement(2) == run.disagreement(6)
        return
    assert run.disagreement(4) is None
    train(run.rewind(4), 5)
    assert run.contents() == before


def test_several_files_are_counted(run: Run) -> None:
    for name in (*rollout_names(1), *rollout_names(3)):
        run.change(name, lost)
    assert (run.disagreement(6) or "").startswith("rollouts/step_000001.jsonl is missing (and 3 mo")


@pytest.mark.parametrize("name", ["metrics.jsonl", LAST], ids=["metrics", "rollouts"])
def test_something_else_in_place_of_a_file_is_damage(run: Run, name: str) -> None:
    """A named pipe, whose reader would wait for ever, and a folder."""
    run.change(name, lost)
    for make in (os.mkfifo, os.mkdir):
        make(run.path / name)
        if name == METRICS:
            with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: it is not a file"):
                run.disagreement(6)
        else:
            assert run.disagreement(6) == f"{name} is damaged"
        (run.path / name).unlink() if make is os.mkfifo else (run.path / name).rmdir()


@pytest.mark.parametrize(
    "change",
    [lost, lambda d: b"", lambda d: bytes(len(d)), lambda d: d[:-9], lambda d: flipped(d, 70)],
    ids=["lost", "empty", "zeros", "torn", "a bit"],
)
def test_a_list_that_is_damaged_is_made_again(
    run: Run, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = run.contents()
    run.change(SUMS, change)
    assert run.disagreement(6) is None
    run.rewind(6)
    assert run.contents() == before
    assert caplog.messages == [f"{SUMS} was damaged, and is made again: the files are as they were"]
    run.change(SUMS, change)
    run.change(FIRST, lambda d: d + b"x")
    assert run.disagreement(6) == f"{SUMS} is damaged, and a file that it listed is too"


def test_rollouts_that_the_user_has_removed_are_no_gap(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    before = run.contents()
    for name in (*rollout_names(1), *rollout_names(2)):
        run.change(name, lost)
    (run.path / REMOVED).write_text("step_000001.*\nstep_000002.jsonl\n")
    assert "step_000002.safetensors is missing" in (run.disagreement(6) or "")
    (run.path / REMOVED).write_text("step_00000[12].* step_000003.jsonl\n")
    assert run.disagreement(6) is None
    run.change(rollout_names(3)[0], lambda d: b"")  # there, so it has to be whole
    assert run.disagreement(6) == "rollouts/step_000003.jsonl is damaged"
    (run.path / rollout_names(3)[0]).write_bytes(before[rollout_names(3)[0]])
    run.rewind(6)
    assert caplog.messages == [f"4 files of rollouts are gone, as {REMOVED} says"]
    assert (run.path / SUMS).read_bytes() == before[SUMS]


OLD: dict[str, Any] = {"step": 4, "metrics_lines": 5, "seconds": 1.0}
"""What checkpoints of older versions have."""


def test_checkpoints_of_older_versions_allow_a_weaker_check(run: Run) -> None:
    before = run.contents()
    assert Records(run.path).disagreement(OLD) is None
    (run.path / SUMS).unlink()
    directory = RunDirectory(run.path)
    directory.records.rewind(OLD)
    train(directory, 5)
    assert run.contents() == before
    for name, change, problem in (
        (FIRST, lost, f"{FIRST} is missing and {REMOVED} does not name it"),
        (LAST.replace("6", "4"), lambda d: b"", "rollouts/step_000004.jsonl is missing"),
        (METRICS, lambda d: d.replace(b'{"step": 3', b'\0"step": 3'), "line 4 of metrics.jsonl"),
        (METRICS, lambda d: d[: d.index(b'{"step": 4')], "metrics.jsonl has 4 of 5 lines"),
    ):
        run.change(name, change)
        assert (Records(run.path).disagreement(OLD) or "").startswith(problem)
        (run.path / name).write_bytes(before[name])
    run.change(METRICS, lambda d: d.replace(b"0.25", b"0.26"))
    assert Records(run.path).disagreement(OLD) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "4"},
        {"step": -4},
        {"metrics_lines": None},
        {"metrics_lines": 1.5},
        {"metrics_lines": 0},
        {"metrics_lines": 1 << 80},
        {"seconds": "1"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"records": []},
        {"records": {METRICS: 7}},
        {"records": {METRICS: {"lines": 5, "size": "9", "sha256": "0"}}},
        {"records": {METRICS: {"lines": 5, "size": -9, "sha256": "0"}}},
    ],
)
def test_facts_of_another_shape_are_damage(run: Run, changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    assert (run.disagreement(4, **changes) or "").startswith(f"state.json: {name}")
