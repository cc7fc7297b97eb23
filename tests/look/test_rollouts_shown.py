"""`minidistill rollouts`: what is read, how it is shown, and the keys on a real terminal."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from safetensors.numpy import load_file, save_file
from support.terminal import terminal

from minidistill.cli import main
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, printable
from minidistill.look.pager import Pager
from minidistill.look.rollout_text import rollout_text
from minidistill.look.rollouts import Recorded, read_rollouts
from minidistill.reporting.terminal.tokens import STYLES

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def rows(run: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["rollouts", str(run), *flags, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_chosen(kept_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = {
        step: [json.loads(line) for line in file.read_text().splitlines()]
        for step, file in enumerate(sorted((kept_run / "rollouts").glob("*.jsonl")), 1)
    }
    last = rows(kept_run, capsys=capsys)
    figures = load_file(kept_run / "rollouts" / "step_000003.safetensors")
    assert [{k: row[k] for k in recorded[3][0]} for row in last] == recorded[3]
    assert [v for row in last for v in row["kl"]] == figures["kl"].astype(float).tolist()
    gaps = figures["student_logprobs"].astype(float) - figures["teacher_logprobs"].astype(float)
    assert [v for row in last for v in row["logprob_gaps"]] == gaps.tolist()
    assert [row["step"] for row in rows(kept_run, "--step", "2", capsys=capsys)] == [2] * 8
    worst = rows(kept_run, "--worst", "5", capsys=capsys)
    all_of_them = [row for step in "123" for row in rows(kept_run, "--step", step, capsys=capsys)]
    means = sorted((float(np.mean(row["kl"])) for row in all_of_them), reverse=True)
    assert [row["mean_kl"] for row in worst] == means[:5]
    task = recorded[1][0]["task_id"]
    chosen = rows(kept_run, "--task", task, capsys=capsys)
    expected = [row for step in recorded.values() for row in step if row["task_id"] == task]
    assert [{k: row[k] for k in expected[0]} for row in chosen] == expected


def test_plain_text_has_no_codes(kept_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(kept_run), "--step", "1", "--worst", "1"]) == 0
    out = capsys.readouterr().out
    (shown,) = read_rollouts(kept_run, 1, worst=1)
    assert not CODES.search(out)
    for part in ("prompt_text", "teacher_prompt_text", "completion"):
        assert shown.row[part] in out
    assert f"mean KL {shown.mean_kl:.3g}" in out
    assert "most disagreement: " in out


def hostile(**more: Any) -> Recorded:
    evil = "\x1b[31m[bold]red[/bold]\u202e\x07"
    row = {
        "task_id": evil, "env": evil, "sample": 0, "stop": "eos", "reward": math.nan,
        "advantage": 1.0, "prompt_text": f"{evil} {'p' * (1 << 20)}",
        "teacher_prompt_text": f"{evil} ctx {'p' * (1 << 20)}",
        "tokens": [evil, "b", "c" * (1 << 20), "d"], "reward_metrics": {evil: evil},
        "inserted": [{"at": 1, "ids": [3], "text": f"\n[user] {evil}\n"}, {"at": "x"}, 3],
    }  # fmt: skip
    kl = [0.0, 0.3, math.nan, 9.0]
    return Recorded(4, {**row, **more}, kl, kl)


def test_hostile_text_is_harmless() -> None:
    text = rollout_text(hostile(), "(1 of 1)", colored=True)
    assert text.plain == printable(text.plain)
    assert "[bold]red[/bold]" in text.plain, "markup is text"
    assert len(text.plain) < 100_000
    assert "more characters)" in text.plain
    assert "1 more tokens" in text.plain
    stream = io.StringIO()
    console = Console(file=stream, width=60, force_terminal=True, color_system="256")
    console.print(text)
    assert CODES.sub("", stream.getvalue()) == printable(CODES.sub("", stream.getvalue()))
    json.loads(json.dumps(hostile().as_data()["kl"]), parse_constant=pytest.fail)


def test_tokens_are_colored_by_their_kl() -> None:
    rollout = hostile(
        tokens=["aa", "bb", "cc", "dd"],
        inserted=[{"at": 2, "text": "<env>"}],
        prompt_text="<user>ask<end>",
        teacher_prompt_text="<user>ctx ask<end>",
    )
    text = rollout_text(rollout, "", colored=False)
    start = text.plain.index("aabb<env>ccdd")
    styles = {
        text.plain[span.start : span.end]: span.style
        for span in text.spans
        if start <= span.start < start + 13
    }
    assert styles["aa"] == STYLES[0]
    assert styles["bb"] == STYLES[2]
    assert styles["dd"] == STYLES[4]
    assert styles["<env>"] == styles["cc"], "no KL is known of either"
    added = [text.plain[s.start : s.end] for s in text.spans if s.style == "cyan"]
    assert added == ["ctx "]
    assert "most disagreement: 'cc' nan, 'dd' 9" in text.plain


# -- keys ------------------------------------------------------------------------------------------


def test_keys_move_between_pages_and_lines() -> None:
    pages = [Text("\n".join(f"page {n} line {i}" for i in range(25))) for n in range(3)]
    pager = Pager(3, lambda index: pages[index], Console(width=40, height=11))
    places = []
    for action in (
        "previous", "down", "down", "up", "page down", "page down", "page down", "next", "next",
        "page up", "first", "last", "unknown",
    ):  # fmt: skip
        pager.press(action)
        places.append((pager.index, pager.top))
    assert places == [
        (0, 0), (0, 1), (0, 2), (0, 1), (0, 11), (0, 15), (1, 0), (2, 0), (2, 0),
        (2, 0), (0, 0), (2, 0), (2, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [b"\x03", "SIGTERM"])
def test_the_terminal_is_restored(kept_run: Path, end: bytes | str) -> None:
    with terminal("rollouts", str(kept_run), rows=50, columns=90) as screen:
        lines = CODES.sub("", screen.read_until("n next")).splitlines()
        (shown, *_) = read_rollouts(kept_run)
        assert "student's prompt" in lines
        start = lines.index("teacher's prompt")
        teacher = shown.row["teacher_prompt_text"].splitlines()
        assert lines[start + 1 : start + 1 + len(teacher)] == teacher
        assert lines[-1].startswith(" 1/8 ")
        assert screen.settings() != screen.before
        for keys, place in ((b"n", " 2/8 "), (b"\x1b[C", " 3/8 "), (b"p\x1b[D", " 1/8 "),
                            (b"G", " 8/8 ")):  # fmt: skip
            screen.send(keys)
            screen.read_until(place)
        shown = screen.read_until("q quit")
        assert "\x1b[?1049l" not in shown
        if isinstance(end, str):
            screen.process.terminate()
        else:
            screen.send(end)
        assert screen.wait() == (130 if end == "SIGTERM" else 0)
        assert screen.output.rstrip().removesuffix("interrupted").rstrip().endswith("\x1b[?1049l")
        assert screen.settings() == screen.before


def test_no_color(kept_run: Path) -> None:
    with terminal("rollouts", str(kept_run), rows=60, NO_COLOR="1") as screen:
        shown = screen.read_until("q quit")
        assert "completion" in shown
        assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|38;5)[0-9;]*m", shown)
        screen.send(b"q")
        assert screen.wait() == 0


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("lines cut", "is damaged: line 8"),
        ("lines lost", "does not have the tokens of"),
        ("tensors cut", "is damaged"),
        ("tensors lost", "it is missing"),
        ("another number", "does not have the tokens of"),
        ("lacks one", "it lacks kl"),
        ("no whole numbers", "other shapes or types"),
        ("no tokens", "line 1 has no tokens"),
    ],
)
def test_damaged_records(
    finished: Path, change: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, tensors = (finished / f"rollouts/step_000003.{e}" for e in ("jsonl", "safetensors"))
    if change == "lines cut":
        lines.write_bytes(lines.read_bytes()[:-20])
    elif change == "lines lost":
        lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    elif change == "no tokens":
        lines.write_text('{"tokens": [3]}\n')
    elif change == "tensors cut":
        tensors.write_bytes(tensors.read_bytes()[:-20])
    elif change == "tensors lost":
        tensors.unlink()
    else:
        found = load_file(tensors)
        if change == "lacks one":
            del found["kl"]
        elif change == "no whole numbers":
            found["offsets"] = found["offsets"].astype("float32")
        else:
            found["kl"] = found["kl"][:-1].copy()
        save_file(found, tensors)
    assert main(["rollouts", str(finished), "--step", "3"]) == EXIT_ENVIRONMENT
    out = capsys.readouterr()
    assert what in out.err
    assert out.out == ""


def test_a_step_that_is_being_written(finished: Path) -> None:
    (finished / "rollouts" / "step_000003.safetensors").unlink()
    (finished / "scoreboard.json").unlink()
    assert {rollout.step for rollout in read_rollouts(finished)} == {2}


def test_what_is_not_there(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, what in (
        ([str(tmp_path / "none")], "is not a run directory"),
        ([str(finished), "--step", "9"], "has no rollouts of step 9"),
        ([str(finished), "--task", "nope"], "no rollout of the task 'nope' is recorded"),
        ([str(finished), "--worst", "x"], "--worst 'x' cannot be used"),
        ([], "rollouts takes a run's directory"),
    ):
        assert main(["rollouts", *args]) == EXIT_USAGE
        assert what in capsys.readouterr().err
    for file in (finished / "rollouts").iterdir():
        file.unlink()
    assert main(["rollouts", str(finished)]) == EXIT_USAGE
    assert "has recorded no rollouts yet" in capsys.readouterr().err
