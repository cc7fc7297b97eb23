"""The displays: their output, the choice between them, and untrusted text."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from minidistill.reporting.formatting import (
    clean,
    count,
    duration,
    kl_level,
    number,
    percent,
    sparkline,
)
from minidistill.reporting.terminal import Display, Header, Sample, open_display
from minidistill.reporting.terminal.live import REFRESH_HZ, LiveDisplay
from minidistill.reporting.terminal.pace import Pace
from minidistill.reporting.terminal.panels import render_scoreboard
from minidistill.reporting.terminal.plain import PlainDisplay
from minidistill.reporting.terminal.tokens import STYLES, sample_text

EVIL = "\x1b[2J\x1b]0;title\x07[bold red]x[/bold red] [/] \u202eabc\x9b31m\rz :smile:"
HEADER = Header("minidistill", (("model", "tiny"), ("output", "runs/a")), 300, 1)
METRICS: dict[str, float] = json.loads(
    """{"teacher_kl": 0.231, "reward/mean": 0.55, "loss/policy": 0.12, "entropy/student": 1.5,
    "kl/sampler_mismatch": 1e-6, "optim/lr": 0.002, "perf/train_tokens_per_second": 1912}"""
)
BASELINE: dict[str, float] = json.loads(
    """{"eval/sokoban-env/baseline_student/avg": 0.05, "eval/sokoban-env/baseline_diff": 0.9,
    "eval/sokoban-env/baseline_teacher/avg": 0.95}"""
)
BOARD: dict[str, Any] = json.loads(
    """{"env": "sokoban-env", "baseline_student": 0.05, "baseline_teacher": 0.95,
    "baseline_diff": 0.9, "student": 0.89, "student_with_context": 0.55, "gap_closed": 0.92,
    "gap_closed_low": 0.88, "gap_closed_high": 0.95, "verdict": "most of the gap is closed",
    "teacher_kl_first": 4.93, "teacher_kl_last": 0.11, "heldout_kl_before": 5.1,
    "heldout_kl_after": 0.12, "drift_kl": 0.3, "length_before": 6.1, "length_after": 5.9,
    "unrelated_kl_before": 1.5, "unrelated_kl_after": 1.2, "heldout_kl_closed": 0.97,
    "drift_verdict": "the answers stay as they were", "outcome": "closed", "judged_by": "score",
    "completions": [{"prompt": "p", "before": "b", "teacher": "t", "after": "a"}],
    "eval_tasks": 256, "steps": 300, "seconds": 73, "per_env": {"sokoban-env": {}}}"""
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def live_display(
    width: int = 100, height: int = 40, **overrides: Any
) -> tuple[LiveDisplay, Terminal]:
    stream = Terminal()
    options = {"markup": False, "emoji": False, "highlight": False, **overrides}
    console = Console(file=stream, width=width, height=height, force_terminal=True, **options)
    return LiveDisplay(stream, console), stream


def plain_display() -> tuple[PlainDisplay, io.StringIO]:
    stream = io.StringIO()
    return PlainDisplay(stream), stream


MAKERS: list[Callable[[], tuple[Display, io.StringIO]]] = [plain_display, live_display]


def without_styles(text: str) -> str:
    """The text without the display's colors and cursor movements, but with other escapes."""
    return re.sub(r"\x1b\[\??[0-9;]*[mKAhl]|\r", "", text)


def show_run(display: Display, text: str = "ok", steps: int = 3) -> None:
    """Show a run. `text` stands for names, notes, tokens and the verdict."""
    display.note(f"before {text}")
    display.open(Header(text, (("model", text),), 300, 1))
    display.baseline({f"eval/{text}/baseline_student/avg": 0.05, **BASELINE})
    for step in range(1, steps + 1):
        with display.phase(f"sample {text}", 64, text) as advance:
            advance(64)
        display.step(step, METRICS, Sample((text, "\n", "b"), (0.0, 1.0, 9.0), 1.0, text))
    display.evaluation(steps, {f"eval/{text}/student/avg": 0.71})
    display.note(f"mind {text}", warning=True)
    texts = {"env": text, "verdict": text, "drift_verdict": text, "judged_by": "teacher_kl"}
    completions = [dict.fromkeys(("prompt", "before", "teacher", "after"), text)]
    per_env = {text: {}, "b": {}}
    display.scoreboard({**BOARD, **texts, "per_env": per_env, "completions": completions})
    display.close()


def test_a_step_is_one_plain_line() -> None:
    display, stream = plain_display()
    display.open(HEADER)
    start = len(stream.getvalue())
    with display.phase("sample", 64, "rollouts") as advance:
        advance(64)
    display.step(12, METRICS, Sample(("a",), (0.1,), 1.0, "e"))
    line = stream.getvalue()[start:]
    figures = "step 12/300  kl 0.231  reward 0.55  loss 0.12  1.91k tok/s  eta "
    assert re.fullmatch(re.escape(figures) + r"\w+\n", line)


def test_plain_tables_are_aligned() -> None:
    display, stream = plain_display()
    show_run(display)
    lines = stream.getvalue().splitlines()
    header = next(i for i, line in enumerate(lines) if "difference" in line)
    row = next(line for line in lines[header:] if "sokoban-env" in line)
    assert lines[header].index("difference") == row.index("+0.9")
    assert "evaluation at step 3  ok  student 0.71" in lines
    assert any(re.fullmatch(r"  gap closed +92%  \(95% interval 88% to 95%\)", x) for x in lines)
    assert "warning: mind ok" in lines


@pytest.mark.parametrize("make", MAKERS)
def test_untrusted_text_neither_controls_the_terminal_nor_is_markup(
    make: Callable[[], tuple[Display, io.StringIO]],
) -> None:
    display, stream = make()
    show_run(display, EVIL)
    output = without_styles(stream.getvalue())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", output)
    assert "[bold red]x[/bold red]" in output
    assert ":smile:" in output


def test_plain_output_has_no_escape_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display, stream = plain_display()
    show_run(display, EVIL)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("make", MAKERS)
def test_missing_metrics_are_omitted(make: Callable[[], tuple[Display, io.StringIO]]) -> None:
    display, stream = make()
    display.open(HEADER)
    display.step(1, {"teacher_kl": 0.5}, None)
    display.step(2, {"teacher_kl": float("nan")}, Sample((), (), None, "e"))
    display.step(3, {}, None)
    display.evaluation(3, {})
    display.baseline({})
    display.scoreboard({"gap_closed": None, "verdict": "no gap", "baseline_diff": 0.01})
    display.close()
    output = without_styles(stream.getvalue())
    assert "reward" not in output
    assert "None" not in output
    assert "no gap" in output
    assert "0.5" in output


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_every_line_fits_the_terminal(width: int) -> None:
    display, stream = live_display(width)
    show_run(display, "ok" if width < 40 else "a long name 漢字漢字 for an environment")
    # The live region moves up and erases lines before it is redrawn.
    for line in re.split(r"\n|\r|\x1b\[\d*[AK]", stream.getvalue()):
        assert cell_len(without_styles(line)) <= width
    for text in ("3/300", "64/64", "tokens/s 1.91k", "teacher KL <0.02", "reward 1", "92%"):
        assert width < 60 or text in without_styles(stream.getvalue())


def test_a_short_terminal_omits_the_sample() -> None:
    texts = []
    for height in (12, 40):
        display, stream = live_display(80, height)
        display.open(HEADER)
        display.step(1, METRICS, Sample(("unmistakable",), (0.1,), 1.0, "e"))
        display.close()
        texts.append(without_styles(stream.getvalue()))
    assert "unmistakable" not in texts[0]
    assert "unmistakable" in texts[1]


def test_phases_that_no_longer_occur_disappear() -> None:
    display, stream = live_display()
    display.open(HEADER)
    for step in (1, 2, 3):
        for name in ("once", "always") if step == 1 else ("always",):
            with display.phase(name, 4, "units") as advance:
                advance(4)
        display.step(step, METRICS, None)
    start = len(stream.getvalue())
    display.close()
    last = without_styles(stream.getvalue()[start:])
    assert "always" in last
    assert "once" not in last


def test_closing_twice_shows_the_cursor_and_later_notes_are_printed() -> None:
    display, stream = live_display()
    display.open(HEADER)
    display.close()
    display.close()
    display.note("after")
    written = stream.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert stream.getvalue().endswith("after\n")


def test_an_uncaught_exception_leaves_the_cursor_visible() -> None:
    code = (
        "import sys; from rich.console import Console;"
        "from minidistill.reporting.terminal import Header;"
        "from minidistill.reporting.terminal.live import LiveDisplay;"
        "d = LiveDisplay(sys.stdout, Console(force_terminal=True, file=sys.stdout));"
        "d.open(Header('t', (), 3, 1)); raise RuntimeError('boom')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "boom" in done.stdout + done.stderr
    assert done.stdout.rfind("\x1b[?25h") > done.stdout.rfind("\x1b[?25l") >= 0


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    def colors() -> bool:
        display, stream = live_display(_environ={**os.environ, "TERM": "xterm-256color"})
        show_run(display)
        return bool(re.search(r"\x1b\[([0-9;]*;)?(3[0-8]|9[0-7])[;m]", stream.getvalue()))

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colors()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colors()


def test_the_display_depends_on_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_display(Terminal()), LiveDisplay)
    assert isinstance(open_display(io.StringIO()), PlainDisplay)
    old = Terminal()
    old.encoding = "iso-8859-1"
    assert isinstance(open_display(old), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(Terminal()), PlainDisplay)


def test_characters_outside_the_encoding_are_replaced() -> None:
    raw = io.BytesIO()
    display = PlainDisplay(io.TextIOWrapper(raw, encoding="ascii"))
    show_run(display, "漢字")
    assert b"4.93 -> 0.11" in raw.getvalue()
    assert b"model  ??" in raw.getvalue()


def test_a_step_does_no_work_per_token() -> None:
    display, _ = live_display()
    display.open(HEADER)
    sample = Sample(("token ",) * 200_000, (0.3,) * 200_000, 1.0, "e")
    display.step(1, METRICS, sample)
    began = time.thread_time()
    for _ in range(100):
        display.step(2, METRICS, sample)
    assert time.thread_time() - began < 0.5
    display.close()
    assert REFRESH_HZ <= 8


def test_tokens_are_colored_by_kl_and_cut_to_fit() -> None:
    text = sample_text(Sample(("a", "\n", "漢字", "d"), (0.0, 0.3, 3.0), None, "e"), 80)
    assert text.plain == "a⏎漢字d"
    assert [span.style for span in text.spans[:3]] == [STYLES[0], STYLES[2], STYLES[4]]
    assert (STYLES[4].underline, STYLES[4].bold) == (True, True)
    for cells in range(1, 12):
        assert cell_len(sample_text(Sample(("漢字",) * 9, (), None, "e"), cells).plain) <= cells


def test_the_scoreboard_exports_to_svg() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_scoreboard(BOARD))
    svg = console.export_svg(title="minidistill")
    assert svg.startswith("<svg")
    assert "gap&#160;closed" in svg
    for board in ({}, *({**BOARD, missing: None} for missing in BOARD)):
        console.print(render_scoreboard(board))


def test_formatting_of_numbers() -> None:
    texts = [number(v) for v in (0, 0.2314, 1912, 5_120_000, -3, 1e-6, 999.9, None, "x\x1b")]
    assert texts == ["0", "0.231", "1.91k", "5.12M", "-3", "1e-06", "1k", "–", "x"]
    assert [duration(v) for v in (None, 5, 62, 7500)] == ["–", "5s", "1m02s", "2h05m"]
    assert [percent(v) for v in (0.5, -0.2, -0.001, None)] == ["50%", "-20%", "0%", "–"]
    assert [kl_level(v) for v in (None, float("nan"), 0.0, 0.02, 99.0)] == [None, None, 0, 1, 4]
    assert [count(n) for n in (64, 5120, 20_480)] == ["64", "5120", "20.5k"]
    assert sparkline([0.0, 7.0, float("nan"), 3.0]) == "▁█ ▄"


@given(st.text())
def test_clean_text_is_one_line_without_control_characters(text: str) -> None:
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", clean(text))


def test_evaluations_do_not_count_in_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 60.0, 60.5, 60.5])  # created, evaluated, step ended, next step started
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    pace = Pace(max_steps=100)
    pace.start_step()
    pace.end_step()
    assert (pace.steps_per_second, pace.seconds_left(90), pace.seconds_left(100)) == (2, 5, 0)


def test_threads_may_run_phases_while_steps_end() -> None:
    display, stream = live_display()
    display.open(HEADER)
    errors: list[BaseException] = []

    def run_phases(thread: int) -> None:
        try:
            for number in range(100):
                with display.phase(f"phase {thread}.{number}", 2, "units") as advance:
                    advance(2)
                display.note(f"note {thread}.{number}", warning=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run_phases, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for step in range(1, 50):
        display.step(step, METRICS, None)
    for thread in threads:
        thread.join()
    display.close()
    assert errors == []
    notes = re.findall(r"warning: note (\d\.\d+)\n", without_styles(stream.getvalue()))
    assert sorted(notes) == sorted(f"{t}.{n}" for t in range(2) for n in range(100))
