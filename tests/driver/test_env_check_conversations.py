"""`minidistill env check` of environments of several turns, which it plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.envs import load_environment
from minidistill.envs.task_rows import task_rows
from minidistill.errors import EXIT_FAILED, EXIT_OK

CONTEXT = ("--orchestrator.teacher_model.context", "Spell well.\n\n", "--samples", "2")
CHECKS = ("conversations", "repeats", "views", "room", "rewards", "time")


@pytest.fixture(autouse=True)
def _same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load an environment again in this process, which takes less time than another one."""
    monkeypatch.setattr(
        "minidistill.driver.env_check.rows_elsewhere",
        lambda id, args: task_rows(load_environment(id, args)),
    )


def check(capsys: pytest.CaptureFixture[str], id: str, *argv: str) -> dict[str, Any]:
    """The report. Its findings are by name."""
    code = cli.main(["env", "check", id, *CONTEXT, *argv, "--json"])
    [report] = json.loads(capsys.readouterr().out)
    found = {f["name"]: f for f in report["findings"]}
    assert report["passed"] == all(f["passed"] is not False for f in found.values())
    assert code == (EXIT_OK if report["passed"] else EXIT_FAILED)
    return {**report, "findings": found}


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {n: f["detail"] for n, f in report["findings"].items() if f["passed"] is False}


def test_a_sound_environment_passes_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    report = check(capsys, "support.checked_conversations:Asking", "--args.max_turns", "3")
    assert not failed(report)
    assert tuple(report["findings"])[-6:] == CHECKS
    figures = report["figures"]
    assert (figures["reward_empty"], figures["reward_random"], figures["reward_own"]) == (0, 0, 0.5)
    # 4 tasks: with empty and random answers 3 turns, with its own 2
    assert figures["turns/mean"] == pytest.approx((3 + 3 + 2) / 3)
    assert figures["turns/restarts"] == 0
    context = figures["teacher_tokens_max"] - figures["student_tokens_max"]
    assert figures["teacher_sample_max"] - figures["student_sample_max"] == context > 0
    assert figures["turn_ms_max"] >= figures["turn_ms_mean"] > 0


@pytest.mark.parametrize(
    ("name", "check_name", "words"),
    [
        ("Random", "repeats", "conversations are others the second time"),
        ("Shared", "repeats", "conversations are others the second time"),
        ("Talkative", "conversations", "max_turns is 3"),
        ("Raising", "conversations", "of 12 fail, first with empty answers: task ox of "),
        ("ShowsContext", "views", "it is 2 times in the student's view, 3 in the teacher's"),
        ("Long", "room", "have no room for a turn"),
        ("BadExample", "rewards", "the environment's example_answer is not the best"),
    ],
)
def test_what_is_broken_fails_its_check(
    capsys: pytest.CaptureFixture[str], name: str, check_name: str, words: str
) -> None:
    id = f"support.checked_conversations:{name}"
    found = failed(check(capsys, id, "--args.max_turns", "3"))
    assert list(found) == [check_name]
    assert words in found[check_name]


@pytest.mark.parametrize(
    ("name", "words"), [("NoRewards", "it has none"), ("Constant", "all are equal")]
)
def test_what_cannot_be_known_is_said_and_no_failure(
    capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    report = check(capsys, f"support.checked_conversations:{name}")
    assert not failed(report)
    assert report["findings"]["rewards"]["passed"] is None
    assert words in report["findings"]["rewards"]["detail"]


def test_an_example_may_take_several_turns(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--args.num_train_examples=8", "--args.num_eval_examples=4", "--args.mode", "multi")
    report = check(capsys, "sokoban-env", *few, "--args.moves_per_turn", "2", "--args.max_depth=6")
    assert not failed(report)
    assert report["figures"]["reward_own"] == 1


def test_the_model_plays_too(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--args.num_train_examples=8", "--args.num_eval_examples=4")
    report = check(capsys, "frozen-lake-env", *few, "--with-model")
    assert not failed(report)
    assert "12 of " in report["findings"]["conversations"]["detail"]
    assert "reward_model" in report["figures"]


def test_the_environment_of_several_turns_of_the_authors_page_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = (ROOT / "docs" / "environments.md").read_text()
    [code] = [part for part in document.split("```python\n") if "class Guessing" in part]
    monkeypatch.chdir(tmp_path)
    Path("guessing.py").write_text(code.partition("```")[0])
    report = check(capsys, "guessing:Guessing", "--args", "{ turns = 3 }")
    assert not failed(report)  # though its prompts are all the same
    assert report["figures"]["reward_own"] == 1
