"""`minidistill`, killed at the n-th time that it touches a file in a folder.

    python -m tools.soak.dying FOLDER N COUNT -- run config.toml …

Python reports opened, made, renamed and removed files to audit hooks, before it does it. N = 0
kills never. The file COUNT then has the number of times.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link",
    "os.listdir", "os.scandir", "shutil.rmtree",
}  # fmt: skip


class Killer:
    """Counts the touches of files in `folder`, and kills this process at the n-th."""

    def __init__(self, folder: str, at: int) -> None:
        self.folder, self.at = os.path.abspath(folder), at
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path != self.folder and not path.startswith(self.folder + os.sep):
            return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    folder, at, count = sys.argv[1:4]
    killer = Killer(folder, int(at))
    sys.addaudithook(killer)
    from minidistill import cli

    sys.argv = ["minidistill", *sys.argv[5:]]
    try:
        return cli.main(sys.argv[1:])
    finally:
        Path(count).write_text(str(killer.count))


if __name__ == "__main__":
    sys.exit(main())
