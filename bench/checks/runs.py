"""Checks 5, 9 and those with vLLM: whole runs of the shipped model."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

from bench.checks.kernels import run_tests
from bench.checks.report import ROOT, SOKOBAN, Findings, Setting
from minidistill import cli

EMBEDDED = ("--inference.engine", "embedded")
# Steps of a moment
TINY = (
    "--ckpt.interval", "2", "--orchestrator.batch_size", "8",
    "--orchestrator.env.0.args.num_train_examples", "16",
    "--orchestrator.env.0.args.num_eval_examples", "8",
)  # fmt: skip
TINY_EVALUATION = ("--orchestrator.eval.num_examples", "8", "--orchestrator.eval.interval", "0")
NO_EVALUATION = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
MISMATCH = {"bfloat16": 1e-2, "float32": 1e-6}  # the run's own limits


def embedded(setting: Setting, findings: Findings) -> None:
    """configs/sokoban.toml with the embedded engine, in bf16 and in fp32 at the same time."""
    run_and_judge(
        setting,
        findings,
        {dtype: (*EMBEDDED, "--model.dtype", dtype) for dtype in ("bfloat16", "float32")},
    )


def vllm(setting: Setting, findings: Findings) -> None:
    """configs/sokoban.toml with vLLM, which shares the GPU with the trainer."""
    name = setting.size("vllm", "embedded")
    run_and_judge(setting, findings, {"bfloat16": ("--inference.engine", name)})


def vllm_tests(setting: Setting, findings: Findings) -> None:
    options = setting.size((), ("-k", "test_a_handle_opens and 0"))
    run_tests(setting, findings, "tests/engines/vllm/test_vllm_gpu.py", options)


def run_and_judge(setting: Setting, findings: Findings, runs: dict[str, tuple[str, ...]]) -> None:
    """Execute runs by name of their dtype, and judge what they learned."""
    paths = {name: setting.scratch("runs") / f"{findings.path.stem}-{name}" for name in runs}
    tiny = (*TINY, *TINY_EVALUATION, "--max_steps", "2")
    flags = {name: (*setting.size((), tiny), *more) for name, more in runs.items()}
    if setting.rehearse:
        codes = {name: _in_process(paths[name], flags[name]) for name in runs}
    else:
        processes = {name: start(paths[name], flags[name]) for name in runs}
        codes = {name: process.wait() for name, process in processes.items()}
    for name, path in paths.items():
        findings.at_most(f"{name}: exit code", codes[name], 0)
        if codes[name] != 0:
            findings.figure(f"{name}: output", _tail(path))
            continue
        board = json.loads((path / "scoreboard.json").read_text())
        gap = board.get("gap_closed")
        findings.figure(f"{name}: seconds", board["seconds"])
        for key in ("gap_closed_low", "baseline_diff", "heldout_kl_before", "heldout_kl_after"):
            findings.figure(f"{name}: {key}", board.get(key))
        gap = float("nan") if gap is None else gap
        findings.at_least(f"{name}: gap closed", gap, 0.9, gpu_only=True)
        warned = [line for line in _log(path) if "  warning: " in line]
        findings.figure(f"{name}: warnings", warned)
        findings.at_most(f"{name}: warnings of preflight", len(warned), 0, gpu_only=True)
        mismatch = max(record["kl/sampler_mismatch"] for record in steps(path))
        findings.at_most(f"{name}: largest mismatch", mismatch, MISMATCH[name])


def resume(setting: Setting, findings: Findings) -> None:
    """Kill a run, resume it, and compare its metrics with those of a run that was left alone."""
    flags = (*TINY, *EMBEDDED, *NO_EVALUATION, "--max_steps", "12")
    folder = setting.scratch("runs")
    whole, killed = folder / "whole", folder / "killed"
    process = start(killed, flags)
    other = None if setting.rehearse else start(whole, flags)
    kill_after(process, killed, step=3)
    assert (killed / "checkpoints" / "latest").exists(), "killed before its first checkpoint"
    last = steps(killed)[-1]["step"]
    findings.figure("killed after step", last)
    again = (*flags, "--resume")
    if other is None:
        codes = [_in_process(whole, flags), _in_process(killed, again)]
    else:
        codes = [other.wait(), start(killed, again).wait()]
    findings.at_most("exit codes", max(codes), 0)
    expected, found = steps(whole), steps(killed)
    numbers = [[record["step"] for record in run] for run in (found, expected)]
    findings.holds("every step is there once", numbers[0] == numbers[1])
    equal, differing = compare(found, expected)
    findings.figure("equal metrics", equal)
    findings.figure("metrics that differ, and by how much", differing)
    # equal on a CPU; on a GPU the check finds out which are
    limit = setting.size(0.05, 0.0)
    kl = differing.get("teacher_kl", 0.0)
    findings.at_most("relative difference of teacher_kl", kl, limit)
    mismatch = max(record["kl/sampler_mismatch"] for record in found)
    findings.at_most("largest mismatch", mismatch, 1e-2)


def compare(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> tuple[list[str], dict[str, float]]:
    """The metrics that are equal in every step, and the largest relative difference of others."""
    differences: dict[str, float] = {}
    for one, other in zip(ours, theirs, strict=True):
        for key in one.keys() | other.keys():
            if key.startswith(("time/", "perf/")):
                continue
            a, b = one.get(key, float("nan")), other.get(key, float("nan"))
            difference = 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
            differences[key] = max(differences.get(key, 0.0), difference)
    equal = sorted(key for key, difference in differences.items() if difference == 0)
    return equal, {k: d for k, d in sorted(differences.items()) if d != 0}


def start(path: Path, flags: Sequence[str]) -> Popen[bytes]:
    """A run in a process of its own. Its output is beside its directory."""
    command = [sys.executable, "-m", "minidistill", "run", SOKOBAN, *flags]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".out"), "ab") as output:
        return Popen(
            [*command, "--output_dir", str(path)],
            cwd=ROOT,
            stdout=output,
            stderr=STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def kill_after(process: Popen[bytes], path: Path, step: int) -> None:
    """Kill a run once it has finished a step. Raises RuntimeError if it ends by itself."""
    while not any(record["step"] >= step for record in steps(path)):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself: {_tail(path)}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def steps(path: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps so far."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return []
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record for line in lines if "teacher_kl" in (record := json.loads(line))]


def _in_process(path: Path, flags: Sequence[str]) -> int:
    return cli.main(["run", SOKOBAN, *flags, "--output_dir", str(path)])


def _log(path: Path) -> list[str]:
    log = path / "logs" / "run.log"
    return log.read_text().splitlines() if log.exists() else []


def _tail(path: Path) -> str:
    output = path.with_suffix(".out")
    return output.read_text(errors="replace")[-1500:] if output.exists() else ""
