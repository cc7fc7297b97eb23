"""Draws the README's picture of the terminal from a finished run.

    python tools/terminal_picture.py runs/sokoban docs/terminal.svg
    python tools/terminal_picture.py runs/sokoban docs/terminal-60.svg 60

The picture shows the live display at one step of that run, and the scoreboard at its end. The last
argument is the width in cells.
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
from minidistill.reporting.terminal.panels import render_baseline, render_header, render_scoreboard
from minidistill.reporting.terminal.region import LiveRegion

WIDTH = 92
PROGRESS = 0.28
"""The share of the steps that is done in the picture: the KL is falling there."""


def draw(run: Path, out: Path, width: int = WIDTH) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    board = json.loads((run / "scoreboard.json").read_text())
    rows = json.loads((run / "env.json").read_text())["header"]
    evaluation = json.loads((run / "config.resolved.json").read_text())["orchestrator"]["eval"]
    header = Header(
        "minidistill",
        tuple(map(tuple, rows)),
        board["steps"],
        1,
        eval_interval=evaluation and evaluation["interval"],
    )
    console = Console(record=True, width=width, height=60, file=io.StringIO(), force_terminal=True)
    console.print(render_header(header))
    console.print(render_baseline(records[0]))
    console.print(replay(run, header, records))
    console.print(render_scoreboard(board))
    out.write_text(console.export_svg(title="minidistill run configs/sokoban.toml"))


def replay(run: Path, header: Header, records: list[dict[str, float]]) -> LiveRegion:
    """The live region after the first steps of the run."""
    clock = [time.monotonic()]
    time.monotonic = lambda: clock[0]  # the displayed rates are those of the run
    region = LiveRegion()
    region.open(header)
    region.end_evaluation(0, records[0])
    steps = [record for record in records if "teacher_kl" in record]
    for record in steps[: int(len(steps) * PROGRESS)]:
        step = int(record.pop("step"))
        rollouts = len((run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines())
        tokens = round(record["time/train"] * record["perf/train_tokens_per_second"])
        phases = (("sample", rollouts, "rollouts"), ("score", rollouts, "rollouts"))
        for name, total, unit in (*phases, ("train", tokens, "tokens")):
            with region.bars.phase(name, total, unit) as advance:
                clock[0] += record.get(f"time/{name}", 0.0)
                advance(total)
        parts = sum(record.get(f"time/{name}", 0.0) for name in ("sample", "score", "train"))
        clock[0] += record["time/step"] - parts
        region.end_step(step, record, sample(run, step))
    return region


def sample(run: Path, step: int) -> Sample:
    """The step's first rollout, which the display shows."""
    stem = run / "rollouts" / f"step_{step:06d}"
    first = json.loads(stem.with_suffix(".jsonl").read_text().splitlines()[0])
    kl = load_file(stem.with_suffix(".safetensors"))["kl"][: len(first["tokens"])]
    return Sample(tuple(first["tokens"]), tuple(map(float, kl)), first["reward"], first["env"])


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
