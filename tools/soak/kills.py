"""Runs that are killed and resumed must leave what an undisturbed run leaves.

A run is killed one to three times, the resumed run too, at a random moment or at a random touch of
a file in its directory (`tools.soak.dying`). Then it is resumed to its end.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from tools.compare_checkouts import compare_runs
from tools.soak.commands import SMALL, Commands, run_arguments, tail
from tools.soak.log import Log

HANG = 300.0  # seconds after which a run has hung
BEFORE_DIRECTORY = 0.1  # of the kills at a moment, those while it is still starting


def soak(log: Log, seed: int, count: int, end: float | None) -> int:
    """Kill `count` times, and return how often that was done before `end`."""
    with Commands(log.work / "kills") as commands:
        whole = commands.folder / "whole"
        soaking = Killing(log, commands)
        if not soaking.run(whole, "whole", resume=False):
            return 0
        log.say(
            f"kills: an undisturbed run takes {soaking.duration:.1f} s and touches files in its "
            f"directory {soaking.touches} times"
        )
        done = number = 0
        while done < count and (end is None or time.monotonic() < end):
            number += 1
            path = commands.folder / f"run-{number}"
            random = Random(f"{seed}/kills/{number}")
            done += soaking.kill_and_resume(path, random, min(count - done, random.randint(1, 3)))
            if soaking.compare(whole, path):
                shutil.rmtree(path)
            else:
                shutil.move(path, log.saved / path.name)
        return done


class Killing:
    """Runs of one soak. `duration` in seconds and `touches` are those of an undisturbed run."""

    def __init__(self, log: Log, commands: Commands) -> None:
        self.log, self.commands = log, commands
        self.duration, self.touches = 0.0, 0
        self._findings = 0

    def run(self, path: Path, label: str, *, resume: bool) -> bool:
        """Run to the end; False, with a finding, if that fails."""
        code, output = self._start(path, 0, None, resume=resume)
        if code != 0:
            self._find(f"{label}: exit code {code}: {output}")
            return False
        count = path.with_name(path.name + ".count")
        if not self.touches:
            self.touches = int(count.read_text())
        count.unlink()
        return True

    def kill_and_resume(self, path: Path, random: Random, kills: int) -> int:
        """Kill the run in `path` at most `kills` times, then resume it to its end."""
        self._findings = 0
        done, history = 0, []
        for _ in range(kills):
            resume = (path / "config.resolved.json").exists()
            at, seconds = 0, None
            if random.random() < 0.5:
                at = random.randint(1, self.touches)
            else:
                early = 0.0 if random.random() < BEFORE_DIRECTORY else 0.55
                seconds = random.uniform(early, 1.02) * self.duration
            code, output = self._start(path, at, seconds, resume=resume)
            where = f"touch {at}" if at else f"{seconds:.1f} s"
            progress = self._progress(path)
            history.append(f"{'resumed, ' if resume else ''}{where}, {progress}")
            if code == 0:
                break  # it ended sooner than that
            done += 1
            kind = "at a touch" if at else "at a moment"
            self.log.count("kills", kind, progress, *["of a resumed run"] * resume)
            if code != -9:
                self._find(f"{path.name}, {'; '.join(history)}: exit code {code}: {output}")
                break
        begun = (path / "config.resolved.json").exists()
        self.log.say(f"kills: {self.log.done['kills']}: {path.name}: {'; '.join(history)}")
        if not self.run(path, f"{path.name}, {'; '.join(history)}", resume=begun) and not begun:
            shutil.rmtree(path)  # the directory of a run that never began: start again
            self.run(path, f"{path.name}, again", resume=False)
        return done

    def compare(self, whole: Path, path: Path) -> bool:
        """Whether a run is the undisturbed one, byte by byte but for timings."""
        if not path.is_dir():
            return False
        for comparison in compare_runs(whole, path):
            if comparison.differences or comparison.added:
                first = [*comparison.differences, *sorted(comparison.added)][0]
                self._find(f"{path.name}: {comparison.file}: {first}")
        for file in _same(whole):
            if _content(path / file) != _content(whole / file):
                self._find(f"{path.name}: {file} is another")
        left = {p.relative_to(path).as_posix() for p in path.rglob("*")}
        left -= {p.relative_to(whole).as_posix() for p in whole.rglob("*")}
        if left:
            self._find(f"{path.name}: left over: {' '.join(sorted(left)[:5])}")
        return not self._findings

    def _start(
        self, path: Path, at: int, seconds: float | None, *, resume: bool
    ) -> tuple[int, str]:
        """Run until the end, a touch or some seconds. Returns the exit code, and what was said."""
        output = path.with_name(path.name + ".out")
        count = path.with_name(path.name + ".count")
        arguments = [
            str(path),
            str(at),
            str(count),
            "--",
            *run_arguments(path, SMALL, resume=resume),
        ]
        process = self.commands.start("tools.soak.dying", *arguments, output=output)
        began = time.monotonic()
        try:
            code = process.wait(HANG if seconds is None else seconds)
        except Exception:
            process.kill()
            code = process.wait()
            if seconds is None:
                self._find(f"{path.name}: no end after {HANG:.0f} s")
        if code == 0 and not resume:  # the least, for the machine may have been busy
            took = time.monotonic() - began
            self.duration = min(self.duration or took, took)
        return code, tail(output)

    def _find(self, what: str) -> None:
        self._findings += 1
        self.log.finding("kills", what)

    def _progress(self, path: Path) -> str:
        """How far a run has come."""
        try:
            lines = (path / "metrics.jsonl").read_text().splitlines()
            step = json.loads(lines[-1])["step"] if lines else "-"
            return f"step {step}"
        except (OSError, ValueError, KeyError):
            return "no metrics" if path.exists() else "no directory"


def _same(run: Path) -> list[str]:
    """The files of a run in which all but timings is the same each time."""
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "baseline.json"]
    return names + [p.relative_to(run).as_posix() for p in sorted((run / "rollouts").iterdir())]


def _content(path: Path) -> Any:
    """A file's bytes; what a JSON file says, whose lists peft makes from sets."""
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    table = json.loads(path.read_bytes())
    table.pop("seconds", None)
    return {k: sorted(v, key=repr) if isinstance(v, list) else v for k, v in table.items()}
