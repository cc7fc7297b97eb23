"""Compares the ways to schedule a step on the shipped model: plain, streamed and asynchronous.

    python -m bench.schedule [--steps N] [--repeats N] [--threads N] [--name NAME] [--no-async]
                            [--spread] [--key VALUE]…

All sample with vLLM in its own process, in alternating runs. `streamed` is what `schedule = "sync"`
does, `plain` the same without training on groups while others are sampled. Other flags are passed
on to the runs as settings. Says by how much the streamed steps' metrics differ from the plain
steps', and refuses to report times if repeated streamed runs are not equal bit for bit.
Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import math
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
    "time/teacher",
    "time/train",
    "time/sync",
    "time/wait",
    "perf/overlap",
    "async/overlap",
    "async/staleness",
)
SCHEDULES = {"plain": "sync", "streamed": "sync", "async": "async"}
TIMINGS = ("time/", "perf/", "async/")
# A program that runs the command line with an engine that hands over nothing before it has ended
PLAIN = """
import sys
from minidistill import cli
def main():
    from minidistill.engines.vllm.engine import VllmEngine
    VllmEngine.streams = False
    return cli.main(sys.argv[1:])
sys.exit(main())
"""

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--no-async", action="store_true", help="compare plain and streamed only")
    parser.add_argument(
        "--spread", action="store_true", help="completions of very different lengths"
    )
    parser.add_argument("--name", default="schedule", help="of the file of results")
    arguments, settings = parser.parse_known_args(argv)
    model = tempfile.TemporaryDirectory()
    used = [*(spread_lengths(Path(model.name)) if arguments.spread else ()), *settings]
    names = [name for name in SCHEDULES if not (arguments.no_async and name == "async")]
    runs: dict[str, list[list[Record]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in runs:  # alternating, so that changes of the machine's load affect all
            runs[name].append(run(name, arguments.steps, arguments.threads, used))
    first, *others = map(results, runs["streamed"])
    if any(other != first for other in others):
        raise SystemExit("two streamed runs differ: their metrics are not equal bit for bit")
    medians = {
        name: {key: statistics.median(figures[key] for figures in repeats) for key in repeats[0]}
        for name, records in runs.items()
        if (repeats := [figures_of(run_records) for run_records in records])
    }
    ratios = {
        name: [
            figures_of(one)["time/step"] / figures_of(other)["time/step"]
            for one, other in zip(runs["plain"], runs[name], strict=True)
        ]
        for name in names[1:]
    }
    report: dict[str, Any] = {
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "spread": arguments.spread,
        "settings": settings,
        "largest_difference": largest_difference(results(runs["plain"][0]), first),
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        **medians,
    }
    target = ROOT / "bench" / "results" / f"{arguments.name}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    for name, figures in medians.items():
        print(f"{name:9}" + "".join(f"  {key} {value:.3f}" for key, value in figures.items()))
    for name, ratio in report["ratio"].items():
        print(f"{name} makes {ratio:.2f} times as many steps per second as plain")
    metric, difference = report["largest_difference"]
    print(f"plain and streamed metrics differ by {difference:.2g} at most ({metric})")
    return 0


def spread_lengths(folder: Path) -> list[str]:
    """Settings with which completions have 5 to 64 tokens, and groups end all through a step.

    The model is the shipped one with smaller logits, because vLLM's highest temperature is 2.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minidistill.models.registry import resolve

    source = resolve("tiny-sokoban")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(2 / 3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    settings = ("temperature", "2.0"), ("max_tokens", "64")
    flags = [f for key, value in settings for f in (f"--orchestrator.sampling.{key}", value)]
    return ["--model.name", str(folder), *flags, "--orchestrator.batch_size", "128"]


def run(name: str, steps: int, threads: int, settings: Sequence[str]) -> list[Record]:
    """The metrics of a run's steps."""
    program = ["-c", PLAIN] if name == "plain" else ["-m", "minidistill"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        command = [sys.executable, *program, "run", str(ROOT / "configs/sokoban.toml")]
        command += ["--inference.engine", "vllm", "--schedule", SCHEDULES[name]]
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
    return [line for line in lines if "teacher_kl" in line]


def figures_of(records: Sequence[Record]) -> dict[str, float]:
    """Medians over the steps of a run."""
    measured = [record for record in records if record["step"] > SKIPPED]
    keys = ["time/step", *(key for key in METRICS if key in measured[0])]
    return {key: statistics.median(record[key] for record in measured) for key in keys}


def results(records: Sequence[Record]) -> list[Record]:
    """What does not depend on timing."""
    return [{k: v for k, v in r.items() if not k.startswith(TIMINGS)} for r in records]


def largest_difference(a: Sequence[Record], b: Sequence[Record]) -> tuple[str, float]:
    """The metric that differs most in any step, relative to its value, and by how much."""
    worst = ("", 0.0)
    for one, other in zip(a, b, strict=True):
        if one.keys() != other.keys():
            return ("their names", math.inf)
        for key in one:
            scale = max(abs(one[key]), abs(other[key]), 1e-3)
            worst = max(worst, (key, abs(one[key] - other[key]) / scale), key=lambda item: item[1])
    return worst


if __name__ == "__main__":
    sys.exit(main())
