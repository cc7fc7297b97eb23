"""A process of this program: it is watched, its last words are kept, and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

PATIENCE = 5.0  # seconds for a process that closed its connection to end


class Subprocess:
    """`python -m module`, the leader of a process group.

    So Ctrl-C in a terminal does not reach it before the step at hand is kept, and `close` ends
    whatever it has started too.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`descriptors` stay open in it, under their numbers; `environment` is added to ours."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )

    def exit_report(self) -> tuple[int | None, str]:
        """Its exit code, None where it lives, and how it ended, with the last it wrote."""
        try:
            code = self.popen.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return None, "it closed its connection"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return code, f"{how}; its last words: {lines[-1].strip()[:300]}" if lines else how

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self, patience: float = 0.0) -> None:
        """The same after `patience` seconds, and forget it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience)
        self.kill()
        self.popen.wait()
        self._log.close()
