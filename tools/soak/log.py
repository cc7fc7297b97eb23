"""What a soak finds: one line each, on the terminal and in a file that is kept."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from minidistill.errors import printable


class Log:
    """The log of a soak in `folder/soak.log`; what repeats a finding is in `folder/findings`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.findings: list[str] = []
        shutil.rmtree(self.work, ignore_errors=True)  # of another soak
        self.work.mkdir(parents=True)
        self.saved.mkdir(exist_ok=True)

    @property
    def work(self) -> Path:
        """A folder for what the soak makes."""
        return self.folder / "work"

    @property
    def saved(self) -> Path:
        return self.folder / "findings"

    def say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {one_line(text)}"
        print(line, flush=True)
        with open(self.folder / "soak.log", "a", encoding="utf-8", errors="replace") as file:
            file.write(line + "\n")

    def finding(self, part: str, what: str) -> None:
        self.findings.append(f"{part}: {what}")
        self.say(f"FINDING  {part}: {what}")


def one_line(text: str, limit: int = 400) -> str:
    """Foreign text for a line of the log."""
    text = " ".join(printable(text).split(" ")).replace("\n", " | ").replace("\t", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
