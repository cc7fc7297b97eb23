"""The id under which a monitor knows a run, so that a resumed run continues its curves."""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path

from minidistill.system.files import write_atomic

logger = logging.getLogger(__name__)


def run_id(run_dir: Path, file: str, monitor: str, *, begun: bool = False) -> str:
    """The id stored in a file of `run_dir`, created if missing.

    Says so if there was one and it is lost, which is also so if the run has `begun` there: the
    curves start again.
    """
    path = run_dir / file
    if path.is_file():  # reading a pipe would never end
        stored = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stored):
            return stored
    if begun or os.path.lexists(path):
        logger.warning(
            f"{path} has no id of a {monitor} run any more: its curves start again there"
        )
    created = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, created + "\n")
    return created
