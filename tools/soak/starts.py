"""Runs that are stopped at a random moment must leave nothing behind in the machine.

Looked at are processes, shared memory, and the temporary folder, after SIGINT, SIGTERM and SIGKILL
of the driver; in a process that runs again and again, also open files and threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random

from tools.soak.commands import SMALL, Commands, run_arguments, tail
from tools.soak.log import Log

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
LONGEST = 9.0  # seconds until a run is stopped
GRACE = 3.0  # seconds in which what a run leaves may go away
STOP = 60.0  # seconds that a run may take to stop
IN_PROCESS = 10  # of the starts, those in one process
TOUCHED = ("torchinductor_", "triton")  # caches of torch in the temporary folder, shared by runs
SHARED = Path("/dev/shm")


def soak(log: Log, seed: int, count: int, end: float | None) -> int:
    """Start and stop `count` runs, and return how many were before `end`."""
    commands = Commands(log.work / "starts")
    random = Random(f"{seed}/starts")
    inside = min(IN_PROCESS, count // 2)
    done = 0
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
    shared, temporary = _shared(), _names(commands.temporary)
    arguments = _arguments(commands, path, kind)
    process = commands.start("minidistill", *arguments, output=output)
    time.sleep(seconds)
    process.send_signal(number)
    what = f"start {index} ({kind}, {number.name} after {seconds:.1f} s)"
    try:
        code = process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
        log.finding("starts", f"{what}: still running after {STOP:.0f} s: {tail(output)}")
    if code not in EXIT_CODES[number]:
        log.finding("starts", f"{what}: exit code {code}: {tail(output)}")
    elif b"Traceback" in output.read_bytes():
        log.finding("starts", f"{what}: a traceback: {tail(output)}")
    _look_for_leaks(log, commands, what, shared, temporary, killed=number == signal.SIGKILL)
    log.say(f"starts: {what}: exit code {code}")
    shutil.rmtree(path, ignore_errors=True)


def _arguments(commands: Commands, path: Path, kind: str) -> list[str]:
    if kind != "scored elsewhere":
        ranks = ("--trainer.world_size", "2") if kind == "two ranks" else ()
        return run_arguments(path, (*SMALL, *ranks), resume=False)
    config = commands.folder / "scored.toml"
    config.write_text(SCORED)
    return ["run", str(config), "--output_dir", str(path)]


def _look_for_leaks(
    log: Log,
    commands: Commands,
    what: str,
    shared: set[str],
    temporary: set[str],
    *,
    killed: bool,
) -> None:
    deadline = time.monotonic() + GRACE
    while (left := commands.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for id, line in left:
        log.finding("starts", f"{what}: the process {id} is left: {line}")
        _kill(id)
    segments = _shared() - shared
    while segments and time.monotonic() < deadline:
        time.sleep(0.1)
        segments = _unused(segments)
    for name in _unused(segments):
        log.finding("starts", f"{what}: the shared memory {name} is left")
    if not killed:  # a killed run cannot remove its files: see `_after_kills`
        for name in _names(commands.temporary) - temporary:
            log.finding("starts", f"{what}: the temporary folder has {name}")


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
    log.say(f"starts: {done} runs in one process")
    return done


def _names(folder: Path) -> set[str]:
    """The entries of a folder, without those that runs share on purpose."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(TOUCHED)}


def _shared() -> set[str]:
    return {path.name for path in SHARED.iterdir()}


def _unused(names: set[str]) -> set[str]:
    """Segments that no living process has mapped or opened: other programs make some too."""
    left = {name for name in names if (SHARED / name).exists()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if not left:
            break
        try:
            text = maps.read_text(errors="replace")
            opened = " ".join(str(p.readlink()) for p in (maps.parent / "fd").iterdir())
        except OSError:
            continue
        left = {name for name in left if name not in text and name not in opened}
    return left


def _kill(id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(id, signal.SIGKILL)
