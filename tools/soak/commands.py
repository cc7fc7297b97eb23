"""The runs that a soak starts: subprocesses of the true command with a private environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "sokoban.toml")
MARK = "MINIDISTILL_SOAK"
"""An environment variable that every process of a soak inherits, to find those that stay."""

# A few seconds: every feature is on, a checkpoint after each step, three of which are kept.
SMALL = (
    "--max_steps", "4", "--ckpt.interval", "1", "--ckpt.keep", "3",
    "--orchestrator.batch_size", "4",
    "--orchestrator.eval.num_examples", "8", "--orchestrator.eval.interval", "2",
    "--orchestrator.env.0.args.num_train_examples", "8",
    "--orchestrator.env.0.args.num_eval_examples", "8",
)  # fmt: skip


class Commands:
    """Starts processes that keep their temporary files and their cache in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        here = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        return os.environ | {
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def start(
        self, module: str, *arguments: str, output: Path, **environment: str
    ) -> subprocess.Popen[bytes]:
        """`python -m module`, with its output in a file and a session of its own."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_take_ctrl_c,
            )

    def processes(self) -> list[tuple[int, str]]:
        """The living processes of this soak but for this one: their ids and command lines."""
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found.append((int(entry.name), line.decode(errors="replace").strip()))
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what still runs: the soak may have been stopped."""
        for id, _ in self.processes():
            kill(id)


def kill(id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(id, signal.SIGKILL)


def _take_ctrl_c() -> None:
    """A soak in a shell's background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tail(output: Path, lines: int = 3) -> str:
    """The end of a process's output."""
    return " | ".join(output.read_text(errors="replace").strip().splitlines()[-lines:])


def run_arguments(path: Path, flags: Sequence[str], *, resume: bool) -> list[str]:
    arguments = ["run", CONFIG, *flags, "--output_dir", str(path)]
    return [*arguments, "--resume"] if resume else arguments
