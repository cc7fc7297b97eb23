"""Compares the built-in Sokoban with the same task as an environment of the package verifiers.

    python -m bench.verifiers [--steps N] [--repeats N] [--threads N] [--name NAME] [--key VALUE]…

Needs verifiers before its version 0.4. The runs alternate, on the shipped model and the embedded
engine; `conversation` is the built-in task played as a conversation of one turn. Other flags are
passed on to the runs as settings. Writes bench/results/NAME.json.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SKIPPED = 3  # steps at the start, while buffers and caches fill
TASK = {
    "num_train_examples": 1024,
    "num_eval_examples": 64,
    "min_moves": 2,
    "max_depth": 6,
    "rules": "omit",
}
BATCH = 64
KINDS = ("built-in", "conversation", "verifiers")
TIMES = ("time/step", "time/sample")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench verifiers", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="verifiers", help="of the file of results")
    arguments, settings = parser.parse_known_args(argv)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repeats):
        for kind in KINDS:  # alternating, so that changes of the machine's load affect all
            runs[kind].append(figures(kind, arguments.steps, arguments.threads, settings))
    medians = {
        kind: {key: statistics.median(run[key] for run in own) for key in own[0]}
        for kind, own in runs.items()
    }
    ratios = {
        f"{key} {kind}": statistics.median(
            one[key] / other[key] for one, other in zip(runs["built-in"], runs[kind], strict=True)
        )
        for kind in KINDS[1:]
        for key in ("rollouts_per_second", "sampled_per_second")
    }
    report = {
        "package": f"verifiers {version('verifiers')}",
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "settings": settings,
        "built_in_by_others": ratios,
        **medians,
    }
    target = ROOT / "bench" / "results" / f"{arguments.name}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    for kind, own in medians.items():
        print(f"{kind:13}" + "".join(f"  {key} {value:.4g}" for key, value in own.items()))
    for key, ratio in ratios.items():
        print(f"built-in / {key.split()[1]}, {key.split()[0]}: {ratio:.3f}")
    return 0


def figures(kind: str, steps: int, threads: int, settings: Sequence[str]) -> dict[str, float]:
    """Medians over the steps of a run, in seconds and rollouts per second."""
    args: dict[str, Any] = dict(TASK)
    if kind == "conversation":
        args |= {"mode": "multi", "max_turns": 1}
    name = "sokoban-env"
    if kind == "verifiers":
        name, args = "verifiers", {"env": "bench.verifiers_sokoban", "env_args": args}
    environments = json.dumps([{"id": name, "name": "task", "args": args}])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        command = [sys.executable, "-m", "minidistill", "run", str(ROOT / "configs/sokoban.toml")]
        command += ["--orchestrator.env", environments, "--no-orchestrator.eval"]
        command += ["--no-orchestrator.teacher_model.eval_baseline", "--ckpt.interval", "0"]
        command += ["--orchestrator.batch_size", str(BATCH)]
        command += ["--max_steps", str(steps + SKIPPED), "--output_dir", str(path), *settings]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environ)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("step", 0) > SKIPPED and "time/step" in line]
    found = {key: statistics.median(line[key] for line in measured) for key in TIMES}
    return {
        **found,
        "rollouts_per_second": BATCH / found["time/step"],
        "sampled_per_second": BATCH / found["time/sample"],
        "reward": statistics.fmean(line["reward/mean"] for line in measured),
    }


if __name__ == "__main__":
    sys.exit(main())
