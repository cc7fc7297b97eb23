"""Compares the steps per second of `schedule = "async"` and `"sync"` on the shipped model.

    python -m bench.schedule [--steps N] [--repeats N] [--threads N] [--key VALUE]…

Both sample with vLLM, in alternating runs. Other flags are passed on to the runs as settings.
Writes bench/results/schedule.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SKIPPED = 3  # steps at the start, while buffers and caches fill
METRICS = (
    "time/sample",
    "time/train",
    "time/sync",
    "time/wait",
    "async/overlap",
    "async/staleness",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    arguments, settings = parser.parse_known_args(argv)
    runs: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    for _ in range(arguments.repeats):
        for schedule in runs:  # alternating, so that changes of the machine's load affect both
            runs[schedule].append(measure(schedule, arguments.steps, arguments.threads, settings))
    medians = {
        schedule: {key: statistics.median(run[key] for run in repeats) for key in repeats[0]}
        for schedule, repeats in runs.items()
    }
    ratios = [
        one["time/step"] / other["time/step"]
        for one, other in zip(runs["sync"], runs["async"], strict=True)
    ]
    result: dict[str, Any] = {
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "settings": settings,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **medians,
    }
    target = ROOT / "bench" / "results" / "schedule.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    for schedule, figures in medians.items():
        print(f"{schedule:6}" + "".join(f"  {key} {value:.3f}" for key, value in figures.items()))
    print(f"async makes {result['ratio']:.2f} times as many steps per second as sync")
    return 0


def measure(schedule: str, steps: int, threads: int, settings: Sequence[str]) -> dict[str, float]:
    """Medians over the steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        command = [sys.executable, "-m", "minidistill", "run", str(ROOT / "configs/sokoban.toml")]
        command += ["--inference.engine", "vllm", "--schedule", schedule]
        command += ["--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline"]
        command += ["--ckpt.interval", "0", "--max_steps", str(steps + SKIPPED)]
        subprocess.run(
            [*command, "--output_dir", str(path), *settings],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["step"] > SKIPPED]
    keys = ["time/step", *(key for key in METRICS if key in records[0])]
    return {key: statistics.median(record[key] for record in records) for key in keys}


if __name__ == "__main__":
    sys.exit(main())
