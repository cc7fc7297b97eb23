"""Output for pipes, logs and scripts: the heartbeat, ASCII, `--quiet` and `--json`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, TESTS
from support.processes import wait_for
from support.runs import command, run

from minidistill import cli
from minidistill.errors import EXIT_HEALTH, EXIT_OK, EXIT_USAGE, UserError, UserErrors
from minidistill.reporting.terminal import Header, Sample
from minidistill.reporting.terminal import plain as plain_module
from minidistill.reporting.terminal.json_events import JsonDisplay
from minidistill.reporting.terminal.pace import Pace
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.reporting.terminal.quiet import QuietDisplay
from minidistill.system.symbols import encodable

HEADER = Header("minidistill", (("mode", "log π"), ("memory", "a"), ("", "b")), 20, 1, Path("/r"))
BOARD = {"verdict": "it learned – mostly", "outcome": "closed", "student": 0.5, "drift_kl": 0.1}
BRIEF = ("--max_steps", "2", "--no-orchestrator.teacher_model.eval_baseline")


def events(text: str) -> list[dict[str, Any]]:
    """The events in a text that has nothing else. Bare NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# -- the heartbeat -----------------------------------------------------------------------------


def test_a_long_phase_that_reports_nothing_has_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain_module, "HEARTBEAT_SECONDS", 0.05)
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.phase("load the model", 1, "model"):
        wait_for(lambda: stream.getvalue().count("\n") >= 2)
    with (
        display.phase("sample", 64, "rollouts") as advance,
        display.phase("train", 64, "rollouts"),
    ):
        advance(16)
        wait_for(lambda: "eta" in stream.getvalue())
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  load the model"
    assert "  sample 16/64 rollouts  eta 0s; train 0/64 rollouts" in lines


def test_there_is_a_heartbeat_only_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module, "HEARTBEAT_SECONDS", 0.2)
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.phase("train", 8, "rollouts"):
        for _ in range(20):  # lines come more often
            display.note("a note")
            time.sleep(0.02)
    time.sleep(0.2)  # without a phase there is nothing to say
    display.close()
    assert set(stream.getvalue().splitlines()) == {"a note"}


def test_a_closed_display_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module, "HEARTBEAT_SECONDS", 0.0)
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.close()
    with display.phase("train", 8, "rollouts"):
        time.sleep(0.1)
    assert stream.getvalue() == ""


# -- the estimated end -------------------------------------------------------------------------


def test_the_end_includes_the_evaluations_that_follow() -> None:
    """20 steps of 2 s, evaluations of 5 s after steps 5, 10 and 15, and passes of 30 s at last."""
    pace = Pace(max_steps=20, eval_interval=5)
    pace.replay([{"step": step, "time/step": 2.0} for step in (1, 2)])
    assert pace.seconds_left(2) == 36
    pace.evaluated(0, 30.0)  # until one is measured, half of the baseline
    assert pace.seconds_left(2) == 36 + 3 * 15 + 30
    assert pace.seconds_left(5) == 30 + 3 * 15 + 30
    pace.evaluated(5, 5.0)
    assert pace.seconds_left(5) == 30 + 2 * 5 + 30
    pace.evaluated(20, 5.0)
    assert pace.seconds_left(20) == 0


@pytest.mark.parametrize(("interval", "seconds"), [(None, 20), (0, 20 + 4)])
def test_a_run_that_evaluates_at_its_end_or_never(interval: int | None, seconds: float) -> None:
    pace = Pace(max_steps=12, eval_interval=interval)
    pace.replay([{"step": 2, "time/step": 2.0}, {"step": 2, "time/eval": 4.0}])
    assert pace.seconds_left(2) == seconds


def test_times_that_are_no_times_are_left_out() -> None:
    pace = Pace(max_steps=3, eval_interval=1)
    pace.replay([{"step": 1, "time/step": None}, {"step": 1, "time/eval": float("nan")}])
    assert pace.seconds_left(1) is None


# -- ASCII -------------------------------------------------------------------------------------


def test_symbols_have_a_form_in_ascii() -> None:
    old = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    texts = {"4.9 → 0.1": "4.9 -> 0.1", "log π": "log pi", "±1 … ≥2": "+/-1 ... >=2", "é": "?"}
    assert {text: encodable(text, old) for text in texts} == texts
    assert encodable("4.9 → 0.1", io.StringIO()) == "4.9 → 0.1"
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert encodable("é ±", latin) == "é ±"


SHOW = """
import sys
from minidistill.reporting.terminal import Header, open_display
display = open_display()
display.open(Header("t", (("mode", "log π → 漢"),), 3, 1))
display.close()
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LANG": "C"}, "log pi -> 漢"),
        ({"LC_ALL": "POSIX", "LANG": "C.UTF-8"}, "log pi -> 漢"),
        ({"PYTHONIOENCODING": "ascii"}, "log pi -> ?"),
        ({"TERM": "dumb"}, "log pi -> 漢"),
        ({"LANG": "C", "PYTHONIOENCODING": "utf-8"}, "log π → 漢"),
        ({"LANG": "C.UTF-8"}, "log π → 漢"),
        ({}, "log π → 漢"),
    ],
)
def test_ascii_where_there_is_no_utf_8(environment: dict[str, str], expected: str) -> None:
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, env={**kept, **environment}, check=True
    )
    assert done.stdout.decode() == f"t\n  mode  {expected}\n"


# -- --quiet -----------------------------------------------------------------------------------


def test_a_quiet_run_prints_its_directory_warnings_and_the_scoreboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", *BRIEF, "--quiet") == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"run directory: {tmp_path / 'run'}")
    assert all(line.startswith("warning: ") for line in lines[:start])
    board = lines.index("scoreboard  sokoban-env")
    assert all(line.startswith("warning: ") for line in lines[start + 1 : board])
    assert all(line.startswith("  ") for line in lines[board + 1 :])
    # of a run that is finished
    assert run(tmp_path / "run", *BRIEF, "--quiet", "--resume") == EXIT_OK
    again = capsys.readouterr().out.splitlines()
    assert again == [*lines[board:], lines[start]]


def test_a_quiet_display_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_module, "HEARTBEAT_SECONDS", 0.0)
    stream = io.StringIO()
    display = QuietDisplay(stream)
    with display.phase("train", 1, "tokens") as advance:
        advance(1)
        time.sleep(0.1)
    display.step(1, {"teacher_kl": 1.0}, None)
    display.note("a note")
    display.note("a warning", warning=True)
    assert stream.getvalue() == "warning: a warning\n"


# -- --json ------------------------------------------------------------------------------------


def json_display() -> tuple[JsonDisplay, io.StringIO]:
    stream = io.StringIO()
    return JsonDisplay(stream), stream


def test_each_call_is_an_event_of_valid_json(tmp_path: Path) -> None:
    display, stream = json_display()
    display.open(HEADER)
    display.baseline({"eval/heldout_kl": float("inf")})
    display.step(1, {"teacher_kl": float("nan"), "reward/mean": 0.5}, Sample((), (), None, "e"))
    display.note("line\u2028 two\n\x1b[2J", warning=True)
    display.note("a note")
    display.checkpoint(1, tmp_path / "step_000001")
    (tmp_path / "metrics.jsonl").touch()
    display.scoreboard({**BOARD, "gap_closed": float("nan")})
    display.end(0, tmp_path)
    text = stream.getvalue()
    assert text.isascii()
    found = events(text)
    assert all(event.pop("time").endswith("+00:00") for event in found)
    assert found == [
        {
            "event": "start",
            "directory": "/r",
            "first_step": 1,
            "max_steps": 20,
            "settings": {"mode": "log π", "memory": "a; b"},
        },
        {"event": "evaluation", "step": 0, "metrics": {"eval/heldout_kl": None}},
        {"event": "step", "step": 1, "metrics": {"teacher_kl": None, "reward/mean": 0.5}},
        {"event": "warning", "text": "line\u2028 two\n\x1b[2J"},
        {"event": "note", "text": "a note"},
        {"event": "checkpoint", "step": 1, "path": str(tmp_path / "step_000001")},
        {
            "event": "end",
            "exit_code": 0,
            "verdict": "it learned – mostly",
            "outcome": "closed",
            "scoreboard": {**BOARD, "gap_closed": None},
            "paths": {"directory": str(tmp_path), "metrics": str(tmp_path / "metrics.jsonl")},
        },
    ]


def test_an_error_is_an_event_with_all_problems() -> None:
    display, stream = json_display()
    problems = [UserError(f"what {i}", f"where {i}", f"fix {i}", 3) for i in range(6)]
    display.error(UserErrors(problems, limit=4))
    (event,) = events(stream.getvalue())
    assert (event["event"], event["exit_code"], event["what"]) == ("error", 3, "what 0")
    assert (event["where"], event["fix"], event["more_problems"]) == ("where 0", "fix 0", 2)
    assert [problem["what"] for problem in event["problems"]] == [f"what {i}" for i in range(4)]


def test_a_run_prints_events_and_nothing_else(tmp_path: Path) -> None:
    """A run as scripts start it, whose environment also writes to standard output."""
    noisy = ("--orchestrator.env.0.id", "support.noisy_env:load")
    done = subprocess.run(
        command(tmp_path / "run", *BRIEF, *noisy, "--json"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
    )
    assert done.returncode == EXIT_OK, done.stderr
    found = events(done.stdout)
    names = [event["event"] for event in found if event["event"] not in ("note", "warning")]
    beginning = ["start", "evaluation", "step", "step", "checkpoint", "evaluation", "end"]
    assert names == beginning
    assert names[-1] == found[-1]["event"]
    paths = found[-1]["paths"]
    assert set(paths) == {"directory", "adapter", "metrics", "scoreboard", "report", "log"}
    assert all(Path(path).exists() for path in paths.values())
    assert found[-1]["scoreboard"]["steps"] == 2
    for noise in ("printed\n", "written to the descriptor\n", "printed by a program\n"):
        assert noise in done.stderr


def test_a_configuration_that_is_wrong_is_an_event(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "nothing.toml", "--json"]) == EXIT_USAGE
    captured = capfd.readouterr()
    (event,) = events(captured.out)
    assert (event["event"], event["exit_code"], event["where"]) == ("error", 2, "nothing.toml")
    assert "error: cannot read nothing.toml" in captured.err  # people still read it


def test_a_health_check_that_stops_a_run_is_an_event(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    env = "--orchestrator.env.0"
    broken = (f"{env}.id", "support.broken_envs:crashing", f"{env}.args.every", "1")
    code = run(tmp_path / "run", *BRIEF, "--no-orchestrator.eval", *broken, "--json")
    assert code == EXIT_HEALTH
    last = events(capfd.readouterr().out)[-1]
    assert (last["event"], last["exit_code"]) == ("error", EXIT_HEALTH)
    assert last["what"]
    assert last["fix"]


def test_quiet_and_json_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "a.toml", "--quiet", "--json"]) == EXIT_USAGE
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_whole_steps_rate_is_in_the_records(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *BRIEF) == EXIT_OK
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "teacher_kl" in record]
    assert len(steps) == 2
    for record in steps:
        tokens = record["completions/length_mean"] * 8  # rollouts
        rate = record["perf/tokens_per_second"]
        assert rate == pytest.approx(tokens / record["time/step"])
        assert rate < record["perf/train_tokens_per_second"]
