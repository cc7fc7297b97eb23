"""`minidistill env check`: our own environments pass it, and each broken one fails where it is
broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, SOKOBAN

from minidistill import cli
from minidistill.envs import load_environment
from minidistill.envs.task_rows import task_rows
from minidistill.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE

CONTEXT = ("--orchestrator.teacher_model.context", "Spell well.\n\n")
FEW = ("--args.num_train_examples=64", "--args.num_eval_examples", "32")
LENGTH = '{ type = "length", unit = "words", max = 9 }'
QUESTIONS = str(ROOT / "configs" / "questions.jsonl")


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load an environment again in this process, which takes less time than another one."""
    monkeypatch.setattr(
        "minidistill.driver.env_check.rows_elsewhere",
        lambda id, args: task_rows(load_environment(id, args)),
    )


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the reports of `env check --json`."""
    code = cli.main(["env", "check", *argv, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else []


def broken(capsys: pytest.CaptureFixture[str], name: str, *argv: str) -> dict[str, str]:
    """The checks that an environment of `support.checked_envs` fails, with their details."""
    code, [report] = check(capsys, f"support.checked_envs:{name}", *CONTEXT, *argv)
    failed = {f["name"]: f["detail"] for f in report["findings"] if f["passed"] is False}
    assert code == (EXIT_FAILED if failed else EXIT_OK)
    assert report["passed"] == (not failed)
    return failed


@pytest.mark.parametrize(
    "argv",
    [
        ("sokoban-env", *FEW),
        ("sokoban-env", *FEW, "--args.answer", "bare", "--args.symbols", "rg"),
        ("minidistill.envs.example:load", "--args", "{ largest = 9, num_eval_examples = 20 }"),
        ("jsonl", "--args.path", QUESTIONS, "--args.reward", LENGTH),
        ("sokoban-env", *FEW, "--args.mode", "multi"),
        ("frozen-lake-env", *FEW),
        ("self-prompts", "--args.path", QUESTIONS),
        (SOKOBAN, "--orchestrator.env.0.args.num_train_examples", "64"),
    ],
    ids=lambda argv: Path(argv[0]).name + str(len(argv)),
)
def test_our_own_environments_pass(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    code, reports = check(capsys, *argv, "--samples", "2")
    failed = [f for report in reports for f in report["findings"] if f["passed"] is False]
    assert not failed
    assert code == EXIT_OK
    assert reports


def test_the_environment_of_the_authors_page_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = (ROOT / "docs" / "environments.md").read_text()
    code = re.search(r"(?ms)^```python\n(class Capitals|from .*?class Capitals.*?)^```", document)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    Path("capitals.py").write_text(code[1])
    args = ("--args", '{ held_out = ["Peru"] }')
    assert f"minidistill env check capitals:Capitals {args[0]} '{args[1]}'" in document
    exit_code, [report] = check(capsys, "capitals:Capitals", *args)
    assert exit_code == EXIT_OK
    assert [f["name"] for f in report["findings"] if f["passed"]] == [
        *("tasks", "deterministic", "splits", "context", "tokens", "rewards", "time"),
    ]
    figures = report["figures"]
    assert (figures["reward_own"], figures["reward_wrong"], figures["reward_empty"]) == (1, 0, 0)
    assert figures["student_tokens_mean"] < figures["teacher_tokens_mean"]


@pytest.mark.parametrize(
    ("name", "failed", "words"),
    [
        ("SameId", "splits", "the id 'one' is twice in train"),
        ("SharedId", "splits", "the id 'ox' is in both splits"),
        ("SharedPrompt", "splits", "1 prompt is in both splits, as that of the task 'ox'"),
        ("NotFinite", "rewards", "6 of 6 scores of an empty answer fail: "),
        ("Raising", "rewards", "6 of 6 scores of an empty answer fail: IndexError"),
        ("Constant", "rewards", "a wrong answer 0.5, the task's own answer 0.5"),
        ("AnswerNotBest", "rewards", "example_answer is not the best"),
        ("ShowsContext", "context", "is 1 times in the student's view, 2 in the teacher's"),
        ("Long", "tokens", "8 of 8 prompts are too long"),
        ("Empty", "tasks", "5 tasks in train, 0 tasks in eval"),
    ],
)
def test_what_is_broken_fails_its_check(
    capsys: pytest.CaptureFixture[str], same_process: None, name: str, failed: str, words: str
) -> None:
    found = broken(capsys, name, "--orchestrator.env.0.score_timeout", "off", "--samples", "3")
    assert list(found) == [failed]
    assert words in found[failed]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HashOrder", "two loads give other tasks: "),
        ("Growing", "two loads give 5 and 4 tasks in train"),
    ],
)
def test_tasks_that_depend_on_the_process_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # of the other process it is 1
    found = broken(capsys, name, "--orchestrator.env.0.score_timeout", "off", "--samples", "3")
    assert list(found) == ["deterministic"]
    assert words in found["deterministic"]


def test_an_order_that_no_seed_decides_fails(
    capsys: pytest.CaptureFixture[str], same_process: None
) -> None:
    # five tasks keep their order by chance once in 120 times
    found = [broken(capsys, "Unseeded", "--samples", "1") for _ in range(3)]
    assert any("deterministic" in names for names in found)


def test_a_score_that_takes_longer_than_its_limit_fails(
    capsys: pytest.CaptureFixture[str], same_process: None
) -> None:
    limit = ("--orchestrator.env.0.score_timeout", "0.01")
    found = broken(capsys, "Slow", *limit, "--samples", "1")
    assert "score_timeout = 0.01 s" in found["rewards"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoRewards", "it has none"),
        ("NoAnswers", "no answer of their own"),
    ],
)
def test_what_cannot_be_known_is_said_and_no_failure(
    capsys: pytest.CaptureFixture[str], same_process: None, name: str, words: str
) -> None:
    off = ("--orchestrator.env.0.score_timeout", "off")
    code, [report] = check(capsys, f"support.checked_envs:{name}", *CONTEXT, *off)
    assert code == EXIT_OK
    [finding] = [f for f in report["findings"] if f["passed"] is None]
    assert finding["name"] == "rewards"
    assert words in finding["detail"]


def test_arguments_may_be_whatever_toml_has(capsys: pytest.CaptureFixture[str]) -> None:
    off = ("--orchestrator.env.0.score_timeout", "off")
    assert not broken(capsys, "Dated", *off, "--args", "{ day = 2026-02-03 }")


def test_the_table_for_people(capsys: pytest.CaptureFixture[str], same_process: None) -> None:
    argv = ["env", "check", "support.checked_envs:Constant", *CONTEXT]
    assert cli.main([*argv, "--orchestrator.env.0.score_timeout", "off"]) == EXIT_FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "support.checked_envs:Constant, with the chat template of tiny-sokoban"
    marks = {line.split()[1]: line.split()[0] for line in lines[1:]}
    assert marks.pop("rewards") == "FAILED"
    assert set(marks.values()) == {"ok"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "takes an environment's id, or a TOML file"),
        (("--json",), "takes an environment's id, or a TOML file"),
        (("nothing-there",), "unknown environment 'nothing-there'"),
        (("jsonl",), "does not take these args"),
        (("sokoban-env", "--samples", "0"), "--samples '0' cannot be used"),
        (("sokoban-env", "--args.colour", "1"), "does not take these args"),
    ],
)
def test_wrong_command_lines_are_refused(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert cli.main(["env", "check", *argv]) == EXIT_USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("env",), ("env", "--help"), ("env", "check", "--help")])
def test_the_commands_have_help(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    code = cli.main([*argv])
    captured = capsys.readouterr()
    assert code == (EXIT_OK if "--help" in argv else EXIT_USAGE)
    assert "env check" in captured.out + captured.err
