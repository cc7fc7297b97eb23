"""Runs that are stopped at a random moment must leave nothing behind in the machine.

Looked at are processes, shared memory, and the temporary folder, after SIGINT, SIGTERM and SIGKILL
of the driver; in a process that runs again and again, also open files and threads.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

from tools.soak.commands import SMALL, Commands, kill, run_arguments, tail
from tools.soak.log import Log
from tools.soak.shared import LOOK, Segments

# A reward of somebody else's is computed in a process of its own.
SCORED = """
max_steps = 4
seq_len = 256
[model]
name = "tiny-sokoban"
[ckpt]
interval = 1
[orchestrator]
batch_size = 4
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
context = "Answer with a number.\\n"
[[orchestrator.env]]
id = "minidistill.envs.example:load"
args = { num_eval_examples = 8 }
"""
KINDS = ("plain", "two ranks", "scored elsewhere")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
EXIT_CODES = {
    signal.SIGTERM: {0, 130, -signal.SIGTERM},
    signal.SIGINT: {0, 130, -signal.SIGINT},
    signal.SIGKILL: {0, -signal.SIGKILL},
}
INTERRUPTED = b"KeyboardInterrupt\n"
OURS = re.compile(rb'cli\.py", line \d+, in main')  # a frame of a traceback
LONGEST = 9.0  # seconds until a run is stopped
GRACE = 10.0  # seconds in which what a run leaves may go away
"""The kernel ends a run's subprocesses with their driver, but for one that has just been started:
that one ends itself as soon as its interpreter runs, which takes a while on a busy machine."""
STOP = 60.0  # seconds that a run may take to stop
IN_PROCESS = 10  # of the starts, those in one process
TOUCHED = ("torchinductor_", "triton")  # caches of torch in the temporary folder, shared by runs


def soak(log: Log, seed: int, count: int, end: float | None) -> int:
    """Start and stop `count` runs, and return how many were before `end`."""
    random = Random(f"{seed}/starts")
    inside = min(IN_PROCESS, count // 2)
    done = 0
    with Commands(log.work / "starts") as commands:
        while done < count - inside and (end is None or time.monotonic() < end):
            kind, number = random.choice(KINDS), random.choice(SIGNALS)
            start_and_stop(log, commands, done, kind, number, random.uniform(0.0, LONGEST))
            done += 1
        _after_kills(log, commands)
        if inside and (end is None or time.monotonic() < end):
            done += repeat(log, commands, seed, inside)
    return done


def start_and_stop(
    log: Log, commands: Commands, index: int, kind: str, number: signal.Signals, seconds: float
) -> None:
    """Start a run, send the signal to its driver after some seconds, and look for leaks."""
    path = commands.folder / f"start-{index}"
    output = path.with_suffix(".out")
    temporary = _names(commands.temporary)
    segments = Segments(commands.processes)
    arguments = _arguments(commands, path, kind)
    process = commands.start("minidistill", *arguments, output=output)
    what = f"start {index} ({kind}, {number.name} after {seconds:.1f} s)"
    code = _wait(process, segments, seconds)
    stopped = code is None
    if code is None:
        process.send_signal(number)
        code = _wait(process, segments, STOP)
    if code is None:
        process.kill()
        code = process.wait()
        log.finding("starts", f"{what}: still running after {STOP:.0f} s: {tail(output)}")
    said = output.read_bytes()
    # SIGINT while the interpreter starts: Python ends by itself, with a traceback of its own
    starting = said.endswith(INTERRUPTED) and OURS.search(said) is None
    if number != signal.SIGINT or not starting:
        if code not in EXIT_CODES[number]:
            log.finding("starts", f"{what}: exit code {code}: {tail(output)}")
        elif b"Traceback" in said:
            log.finding("starts", f"{what}: a traceback: {tail(output)}")
    took = _wait_for_processes(log, commands, what)
    for name in segments.left():
        log.finding("starts", f"{what}: the shared memory {name} is left")
    if number != signal.SIGKILL:  # a killed run cannot remove its files: see `_after_kills`
        for name in _names(commands.temporary) - temporary:
            log.finding("starts", f"{what}: the temporary folder has {name}")
    log.count("starts", f"{kind}, {number.name if stopped else 'ended before'}, exit code {code}")
    done = log.done["starts"]
    log.say(f"starts: {done}: {what}: exit code {code}, its processes ended {took:.1f} s later")
    shutil.rmtree(path, ignore_errors=True)


def _wait(process: Any, segments: Segments, seconds: float) -> int | None:
    """The exit code of a run that ends within some seconds, else None."""
    deadline = time.monotonic() + seconds
    while True:
        segments.look()
        try:
            code: int = process.wait(max(0.0, min(LOOK, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                return None
        else:
            return code


def _wait_for_processes(log: Log, commands: Commands, what: str) -> float:
    """How long processes of a run stayed, in seconds. Those that do for `GRACE` are findings."""
    began = time.monotonic()
    while (left := commands.processes()) and time.monotonic() < began + GRACE:
        time.sleep(0.05)
    for id, line in left:
        log.finding("starts", f"{what}: the process {id} is left: {line}")
        kill(id)
    return time.monotonic() - began


def _arguments(commands: Commands, path: Path, kind: str) -> list[str]:
    if kind != "scored elsewhere":
        ranks = ("--trainer.world_size", "2") if kind == "two ranks" else ()
        return run_arguments(path, (*SMALL, *ranks), resume=False)
    config = commands.folder / "scored.toml"
    config.write_text(SCORED)
    return ["run", str(config), "--output_dir", str(path)]


def _after_kills(log: Log, commands: Commands) -> None:
    """What killed runs left in the temporary folder is gone after a run that ends."""
    path = commands.folder / "last"
    output = path.with_suffix(".out")
    process = commands.start(
        "minidistill", *run_arguments(path, SMALL, resume=False), output=output
    )
    if process.wait() != 0:
        log.finding("starts", f"a run after the others: {tail(output)}")
    for name in _names(commands.temporary):
        log.finding("starts", f"after a whole run the temporary folder still has {name}")


def repeat(log: Log, commands: Commands, seed: int, count: int) -> int:
    """Runs in one process, stopped at random: it must not collect open files or threads."""
    output = commands.folder / "repeated.out"
    arguments = [str(commands.folder / "repeated"), str(count), str(seed)]
    process = commands.start("tools.soak.repeated", *arguments, output=output)
    code = process.wait()
    lines = output.read_text(errors="replace").splitlines()
    for line in lines:
        if line.startswith("LEAK"):
            log.finding("starts", line)
    if code != 0:
        log.finding("starts", f"runs in one process: exit code {code}: {tail(output)}")
    done = sum(line.startswith("run ") for line in lines)
    for _ in range(done):
        log.count("starts", "in one process")
    log.say(f"starts: {done} runs in one process")
    return done


def _names(folder: Path) -> set[str]:
    """The entries of a folder, without those that runs share on purpose."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(TOUCHED)}
