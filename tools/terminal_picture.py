"""Draws the README's picture of the terminal from a finished run: `docs/picture.py RUN OUT.svg`.

It shows what the live display showed at one step of that run, and the scoreboard at its end.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from safetensors.numpy import load_file

from minidistill.reporting.terminal import Header, Sample
from minidistill.reporting.terminal.board import render_baseline, render_scoreboard
from minidistill.reporting.terminal.frame import Frame
from minidistill.reporting.terminal.live import render_header

STEP_SHOWN = 0.28  # of the run: where the KL falls


def draw(run: Path, out: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    board = json.loads((run / "scoreboard.json").read_text())
    rows = json.loads((run / "env.json").read_text())["header"]
    header = Header("minidistill", tuple(map(tuple, rows)), board["steps"], 1)
    console = Console(record=True, width=92, height=60, file=io.StringIO(), force_terminal=True)
    console.print(render_header(header))
    console.print(render_baseline(records[0]))
    now = [time.monotonic()]
    time.monotonic = lambda: now[0]  # the frame's clock runs as the run's did
    frame = Frame()
    frame.open(header)
    steps = [record for record in records if "teacher_kl" in record]
    for record in steps[: int(len(steps) * STEP_SHOWN)]:
        number = record.pop("step")
        for name, unit in (("sample", "rollouts"), ("score", "rollouts"), ("train", "tokens")):
            seconds = record.get(f"time/{name}", 0.0)
            rollouts = len((run / "rollouts" / f"step_{number:06d}.jsonl").read_text().splitlines())
            tokens = round(seconds * record["perf/train_tokens_per_second"])
            total = rollouts if unit == "rollouts" else tokens
            phase = frame.begin(name, total, unit)
            now[0] += seconds
            phase.advance(total)
            phase.stop()
        frame.step(number, record, sample(run, number))
    console.print(frame)
    console.print(render_scoreboard(board))
    out.write_text(console.export_svg(title="minidistill run configs/sokoban.toml"))


def sample(run: Path, step: int) -> Sample:
    """The step's first rollout, as the display shows it."""
    stem = run / "rollouts" / f"step_{step:06d}"
    first = json.loads(stem.with_suffix(".jsonl").read_text().splitlines()[0])
    kl = load_file(stem.with_suffix(".safetensors"))["kl"][: len(first["tokens"])]
    return Sample(tuple(first["tokens"]), tuple(map(float, kl)), first["reward"], first["env"])


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
