"""A soak's log: its settings, what it does and finds, one line each, and a summary."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TextIO

from minidistill.errors import printable
from tools.soak.commands import ROOT

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "httpx", "pydantic")


class Log:
    """The log of a soak in `folder/soak.log`; what repeats a finding is in `folder/findings`."""

    def __init__(self, folder: Path, copy: Path | None = None) -> None:
        """`copy` is another file for the log. Both start empty."""
        self.folder = folder.resolve()
        self.findings: list[str] = []
        self.done: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        shutil.rmtree(self.work, ignore_errors=True)  # of another soak
        self.work.mkdir(parents=True)
        self.saved.mkdir(exist_ok=True)
        self._files = [_opened(path) for path in (self.folder / "soak.log", copy) if path]

    @property
    def work(self) -> Path:
        """A folder for what the soak makes."""
        return self.folder / "work"

    @property
    def saved(self) -> Path:
        return self.folder / "findings"

    def say(self, text: str) -> None:
        """Write a line, in which the soak's folder and the checkout have short names."""
        text = text.replace(str(self.folder), "FOLDER").replace(str(ROOT), "CHECKOUT")
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {one_line(text)}"
        for file in self._files:
            print(line, file=file)
        print(line, flush=True)

    def finding(self, part: str, what: str) -> None:
        self.findings.append(f"{part}: {what}")
        self.say(f"FINDING  {part}: {what}")

    def count(self, part: str, *kinds: str) -> None:
        """Count one thing that was done, under each of its kinds."""
        self.done[part] += 1
        self.kinds.setdefault(part, Counter()).update(kinds)

    def counted(self, part: str) -> list[str]:
        """How often each kind was done, by name."""
        kinds = sorted(self.kinds.get(part, Counter()).items())
        return [f"{times} × {kind}" for kind, times in kinds]


def versions() -> list[str]:
    """What a soak is of: the commit, the machine and the packages."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return [
        f"commit {_git('rev-parse', 'HEAD') or 'unknown'}"
        + (", with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores",
        packages,
    ]


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _opened(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", errors="replace", buffering=1)


def one_line(text: str, limit: int = 400) -> str:
    """Foreign text for a line of the log."""
    text = " ".join(printable(text).split(" ")).replace("\n", " | ").replace("\t", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
