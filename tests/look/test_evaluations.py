"""`minidistill eval`: the scoreboard's own figures, paired differences, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minidistill.cli import main
from minidistill.evaluation.intervals import RESAMPLES
from minidistill.look import evaluation
from minidistill.look.figures import Figure


def result(*args: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["eval", *args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_has_its_scoreboard_bit_for_bit(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = json.loads((finished / "scoreboard.json").read_text())
    baseline = json.loads((finished / "baseline.json").read_text())["rewards"]
    before = files(finished)
    out = tmp_path / "out.json"
    found = result(str(finished), "--with-context", "--out", str(out), capsys=capsys)
    assert files(finished) == before, "nothing is written to the run"
    assert json.loads(out.read_text()) == found
    rows = {row["view"]: row for row in found["results"]}
    assert list(rows) == ["base", "base in context", "student", "student in context"]
    for view, key in (
        ("base", "baseline_student"),
        ("base in context", "baseline_teacher"),
        ("student", "student"),
        ("student in context", "student_with_context"),
    ):
        assert rows[view]["score"] == board[key]
    assert rows["base"]["rewards"] == baseline["baseline_student"]
    assert rows["base in context"]["rewards"] == baseline["baseline_teacher"]
    assert rows["base in context"]["difference"] == board["baseline_diff"]
    assert rows["base in context"]["difference_low"] == board["baseline_diff_low"]
    assert rows["base in context"]["difference_high"] == board["baseline_diff_high"]
    assert rows["student"]["kl"] == board["heldout_kl_after"]
    assert board["heldout_kl_after"] != board["heldout_kl_before"]
    assert rows["student"]["length"] == board["length_after"]
    assert (found["tasks"], found["seed"]) == (16, 0)


def test_several_are_compared_on_the_same_tasks(
    finished: Path, far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one's tasks, seed and settings count; each has its own prompts and context."""
    settings = far / "config.toml"
    settings.write_text("seed = 7\n" + settings.read_text())
    names, out = [str(finished), str(far), "tiny-sokoban"], tmp_path / "out.json"
    assert main(["eval", *names, "--n", "8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "differences are from finished, on the same tasks" in shown
    assert [line.split()[0] for line in shown.splitlines() if "tiny-" in line] == [names[2]]
    assert "8 held-out tasks of sokoban-env" in shown
    found = json.loads(out.read_text())
    first, run, base = found["results"]
    assert [row["name"] for row in found["results"]] == names
    assert (found["tasks"], found["seed"]) == (8, 0)
    assert (first["difference"], base["kl"]) == (None, None), "the model's context is not known"
    assert run["kl"] != first["kl"]
    rewards = [np.array(row["rewards"]["sokoban-env"]) for row in (run, first)]
    assert run["difference"] == pytest.approx(float((rewards[0] - rewards[1]).mean()))
    assert run["kl_difference"] == pytest.approx(run["kl"] - first["kl"])
    asked = ("--env", "sokoban-env", "--args", ARGS, "--n", "8", "--max-tokens", "12")
    alone = result(str(far / "adapter"), *asked, capsys=capsys)
    assert alone["results"][0]["rewards"] == run["rewards"], "the same weights, tasks and seeds"


ARGS = (
    "{ num_train_examples = 16, num_eval_examples = 16, min_moves = 2, max_depth = 6, "
    'rules = "omit" }'
)


def test_paired_intervals_by_hand() -> None:
    """The difference of two means in each resample is the mean of the differences."""
    a, b = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    difference = Figure.of_values(a, 3).minus(Figure.of_values(b, 3))
    rng = np.random.default_rng(3)
    chosen = rng.integers(0, 8, size=(RESAMPLES, 8))
    means = (np.array(a) - np.array(b))[chosen].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert difference.mean == pytest.approx(0.375)
    assert difference.interval is not None
    assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))
    same = Figure.of_values(a, 3).minus(Figure.of_values(a, 3))
    assert (same.mean, same.interval) == (0.0, None)
    assert Figure.of_values(a[:7], 3).interval is None


def test_an_environment_of_a_file(
    far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "mine.toml"
    file.write_text(
        f'[[orchestrator.env]]\nid = "jsonl"\nname = "mine"\n'
        f'args = {{ path = "{prompts}", num_eval_examples = 4 }}\n'
    )
    found = result(str(far), "--env", str(file), capsys=capsys)
    assert found["environments"] == {"mine": 4}
    (student,) = found["results"]
    assert student["score"] is None, "it has no reward"
    assert student["kl"] > 0
    # without a context there is nothing to measure
    assert main(["eval", str(far / "adapter"), "--env", str(file)]) == 2
    assert "there is nothing to measure" in capsys.readouterr().err
    given = result(
        str(far / "adapter"), "--env", str(file), "--context", "Name a fruit. ",
        "--max-tokens", "12", capsys=capsys,
    )  # fmt: skip
    assert given["results"][0]["kl"] == student["kl"]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["tiny-sokoban"], "there are no tasks to evaluate it on"),
        (["tiny-sokoban", "--env", "jsonl"], "missing a required argument: 'path'"),
        (["tiny-sokoban", "--env", "sokobn-env"], "unknown environment 'sokobn-env'"),
        (["tiny-sokoban", "--env", "jsonl", "--args", "path"], "--args is no table"),
        (["tiny-sokoban", "--args", "{}"], "--args are those of an environment"),
        (["tiny-sokoban", "--env", "none.toml"], "cannot read none.toml"),
        (["tiny-sokoban", "--env", "sokoban-env", "--n", "0"], "--n '0' cannot be used"),
        (["tiny-sokoban", "--env", "sokoban-env", "--n", "8", "--with-context"],
         "no context is known for"),
        ([], "eval takes runs, adapters or models"),
        (["tiny-sokoban", "--env", "sokoban-env", "--n", "1", "--out", "."], ". is a folder"),
        (["tiny-sokoban", "--temperature", "nan"], "--temperature 'nan' cannot be used"),
    ],
)  # fmt: skip
def test_what_is_refused(args: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *args]) == 2
    out = capsys.readouterr()
    assert what in out.err
    assert "  fix: " in out.err
    assert out.out == ""


def test_what_is_not_finite_is_no_score(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = evaluation.teacher_kl

    def broken(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        found.by_prompt.sums[3] = math.nan
        return found

    monkeypatch.setattr(evaluation, "teacher_kl", broken)
    assert main(["eval", str(finished), "--n", "8", "--json"]) == 4
    out = capsys.readouterr()
    assert "is not a finite number" in out.err
    assert out.out == ""


def test_what_an_environment_prints_is_no_part_of_the_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["tiny-sokoban", "--env", "support.noisy_env:load", "--n", "2", "--max-tokens", "2"]
    assert main(["eval", *args, "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["tasks"] == 2
    assert "printed" in out.err
