"""The live display in a real terminal: Ctrl-C at several moments, and resumed curves."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.runs import run
from support.screen import Screen, in_terminal

from minidistill import cli, logs
from minidistill.driver.loop import Interrupt, _interrupts
from minidistill.errors import EXIT_INTERRUPTED
from minidistill.reporting.terminal import Header, SafeDisplay, lasting_output, open_display
from minidistill.reporting.terminal.live import LiveDisplay

BRIEF = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
BORDERS = ("╭", "╰")
METRICS = {"teacher_kl": 1.0, "reward/mean": 0.5}


def stand_in(moment: str, again: bool) -> int:
    """A display that is shown until the keys are pressed, and ended as a run ends."""

    def wait(where: str, interrupt: Interrupt | None = None) -> None:
        if where != moment:
            return
        print(f"waits at {where}", flush=True)
        deadline = time.monotonic() + 20
        while (interrupt is None or not interrupt.requested) and time.monotonic() < deadline:
            time.sleep(0.02)
        if again:
            print("waits for the second", flush=True)
            time.sleep(20)

    def run(args: Any) -> int:
        with (
            lasting_output(),
            contextlib.closing(SafeDisplay(open_display())) as display,
            logs.to_terminal(display.note),
        ):
            with display.phase("load the model", 1, "model"):
                wait("loading")
            display.open(Header("minidistill", (("model", "tiny"),), 9, 1))
            with _interrupts() as interrupt:
                for step in (1, 2, 3):
                    with display.phase("train", 4, "tokens") as advance:
                        wait(f"training {step}", interrupt)
                        advance(4)
                    display.step(step, METRICS, None)
                    if interrupt.requested:
                        display.note(f"stopped after step {step}", True)
                        return EXIT_INTERRUPTED
        return 0

    cli._dispatch = run
    return cli.main([])


def show(moment: str, *, again: bool = False, keys: bytes = b"\x03") -> tuple[int, list[str]]:
    """Press keys whenever the program says that it waits."""

    def see(text: str, typed: int) -> bytes:
        return keys if text.count("waits ") > typed // len(keys) else b""

    code, screen, echoes = in_terminal(lambda: stand_in(moment, again), see, 60)
    assert echoes, "the terminal is left without its echo"
    assert not screen.cursor_hidden
    return code, [line.rstrip() for line in screen.lines]


@pytest.mark.parametrize("keys", [b"\x03", b"\n\nabc\x03"], ids=["ctrl-c", "and other keys"])
@pytest.mark.parametrize("moment", ["training 1", "training 3"])
def test_ctrl_c_leaves_one_whole_region(moment: str, keys: bytes) -> None:
    code, lines = show(moment, keys=keys)
    assert code == EXIT_INTERRUPTED
    text = "\n".join(lines)
    assert "^C" not in text
    # the header and the region, each with its borders
    assert [line[0] for line in lines if line.startswith(BORDERS)] == ["╭", "╰"] * 2
    step = moment[-1]
    assert lines.index(f"warning: stopped after step {step}") < lines.index(lines[-3])
    assert "warning: stopping after this step; press Ctrl-C again to" in text
    region = lines[max(i for i, line in enumerate(lines) if line.startswith("╭")) :]
    assert sum("step " in line for line in region) == 1
    assert all(len(line) == 60 for line in region if line)


def test_ctrl_c_before_the_header_leaves_no_bar() -> None:
    code, lines = show("loading")
    assert code == EXIT_INTERRUPTED
    assert [line for line in lines if line] == ["waits at loading", "interrupted"]


def test_a_second_ctrl_c_ends_at_once() -> None:
    code, lines = show("training 2", again=True)
    assert code == EXIT_INTERRUPTED
    assert [line[0] for line in lines if line.startswith(BORDERS)] == ["╭", "╰"] * 2
    assert [line for line in lines if line][-1] == "interrupted"
    assert "Traceback" not in "\n".join(lines)


def busy() -> int:
    """Threads that print while steps end."""
    with contextlib.closing(open_display()) as display, lasting_output():

        def talk(thread: int) -> None:
            for number in range(60):
                display.note(f"note {thread}.{number}")
                if thread == 0:  # the prints of two threads may share a line
                    print(f"print {number}")

        threads = [threading.Thread(target=talk, args=(n,)) for n in range(2)]
        display.open(Header("minidistill", (("model", "tiny"),), 99, 1))
        for thread in threads:
            thread.start()
        for step in range(1, 41):
            with display.phase(f"phase {step % 3}", 4, "tokens") as advance:
                advance(4)
            display.step(step, METRICS, None)
        for thread in threads:
            thread.join()
    return 0


def test_threads_that_print_leave_no_lines_of_the_region() -> None:
    code, screen, _ = in_terminal(busy, lambda text, typed: b"", 60)
    assert code == 0
    lines = [line.rstrip() for line in screen.lines]
    assert [line[0] for line in lines if line.startswith(BORDERS)] == ["╭", "╰"] * 2
    notes = [f"note {n}.{i}" for n in (0, 1) for i in range(60)]
    prints = [f"print {i}" for i in range(60)]
    shown = [line for line in lines if line.startswith(("note", "print"))]
    assert sorted(shown) == sorted(notes + prints)


def test_a_run_that_is_stopped_in_a_terminal(tmp_path: Path) -> None:
    """The whole program, with its own processes and libraries."""

    def see(text: str, typed: int) -> bytes:
        return b"\x03" if not typed and re.search(r"teacher kl", text) else b""

    steps = ("--max_steps", "400", "--ckpt.interval", "0")
    code, screen, echoes = in_terminal(lambda: run(tmp_path / "run", *BRIEF, *steps), see)
    assert (code, echoes, screen.cursor_hidden) == (EXIT_INTERRUPTED, True, False)
    lines = [line.rstrip() for line in screen.lines]
    assert [line[0] for line in lines if line.startswith(BORDERS)] == ["╭", "╰"] * 2
    assert "^C" not in "\n".join(lines)
    assert "--resume continues from here" in "\n".join(lines)


def live(width: int = 80) -> tuple[LiveDisplay, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=50, force_terminal=True, color_system=None)
    return LiveDisplay(stream, console), stream


def last_region(show: Callable[[LiveDisplay], None], width: int = 80) -> str:
    display, stream = live(width)
    show(display)
    display.close()
    screen = Screen(width)
    screen.feed(stream.getvalue())
    text = "\n".join(screen.lines)
    return text[text.rindex("╭") :]


def test_curves_and_pace_survive_a_resume() -> None:
    history: tuple[dict[str, Any], ...] = (
        {"step": 0, "time/eval": 9.0},
        {"step": 1, "teacher_kl": 8.0, "reward/mean": 0.0, "time/step": 2.0},
        {"step": 2, "teacher_kl": None, "reward/mean": 0.0, "time/step": 2.0},  # it was not finite
        {"step": 3, "teacher_kl": 1.0, "reward/mean": 0.0, "time/step": 2.0},
    )

    def resume(display: LiveDisplay) -> None:
        display.open(Header("t", (), 13, 4, eval_interval=0, history=history))

    region = last_region(resume)
    assert "teacher kl 8 █ ▁ 1" in region
    assert re.search(r"eta 2[89]s", region)  # 10 steps of 2 s, and 9 s at the end


def test_a_long_phase_says_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for width, expected in ((60, "eta 1m30s"), (80, "0.533/s eta 1m30s")):

        def evaluate(display: LiveDisplay) -> None:
            display.open(Header("t", (), 3, 1))
            for name in ("evaluate student", "evaluate student with context"):
                with display.phase(name, 64, "rollouts") as advance:
                    now[0] += 30
                    advance(16)
                    if name == "evaluate student":
                        advance(48)
                    else:
                        display.close()

        region = last_region(evaluate, width)
        assert expected in region
        assert "eval student " in region
        assert "eval student w" in region
        assert "16/64 rollouts" in region
        assert "2.13/s" in region  # of the one that has ended: no eta
        assert region.count("eta") == 1


def test_the_rate_of_a_phase_is_that_of_this_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def steps(display: LiveDisplay) -> None:
        display.open(Header("t", (), 3, 1))
        with display.phase("train", 10, "tokens") as advance:
            now[0] += 10
            advance(10)
        with display.phase("train", 10, "tokens") as advance:
            now[0] += 1
            advance(10)
            display.close()  # amid the phase

    assert "10/s" in last_region(steps)
