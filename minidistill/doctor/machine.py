"""The machine: memory, cores, locale, and whether the hub can be reached."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

from minidistill.doctor.result import Result, failed, passed, skipped
from minidistill.system.symbols import wants_ascii
from minidistill.system.threads import CGROUPS, usable_cores

GIB = 1 << 30
LEAST_MEMORY = 1.5 * GIB
"""Of the shipped run, with the libraries."""
HUB_SECONDS = 3.0


def locale() -> Result:
    """File names and output can have any character."""
    import locale

    encoding = sys.getfilesystemencoding()
    fix = "export LC_ALL=C.UTF-8"
    try:
        name = locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:
        wanted = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG")
        return failed(f"the locale {wanted} is not installed", fix)
    if encoding.lower() not in ("utf-8", "utf8"):
        return failed(f"{name}: file names are in {encoding}", fix)
    how = ", the terminal is shown in ASCII" if wants_ascii(sys.__stdout__) else ""
    return passed(f"{name}, {encoding}{how}")


def memory() -> Result:
    """Memory for the shipped model, at least."""
    cores = usable_cores()
    available = _available()
    text = f"{available / GIB:.1f} GiB available, {cores} core{'' if cores == 1 else 's'}"
    if not available >= LEAST_MEMORY:
        need = f"{LEAST_MEMORY / GIB:.1f} GiB"
        return failed(text, f"end other programs, or give the container more: a run takes {need}")
    return passed(text)


def _available() -> int:
    """Bytes that this process can still have, of the machine and of its container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    available = int(facts["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # no cgroup of version 2, or no limit
        limit = int((CGROUPS / "memory.max").read_text())
        available = min(available, limit - int((CGROUPS / "memory.current").read_text()))
    return available


def hub() -> Result:
    """Whether models can be downloaded. A run needs that only for those that are not here."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return skipped("HF_HUB_OFFLINE is set: models come from folders and the cache")
    answers: list[str] = []
    thread = threading.Thread(target=_ask_hub, args=(constants.ENDPOINT, answers), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)  # looking up a name has no time limit of its own
    problem = answers[0] if answers else f"no answer within {HUB_SECONDS:g} s"
    if problem:
        fix = "use a folder as model.name, a built-in model, or one in the cache; behind a proxy "
        return skipped(f"{constants.ENDPOINT}: {problem}", f"{fix}set HTTPS_PROXY")
    return passed(f"{constants.ENDPOINT} answers")


def _ask_hub(endpoint: str, answers: list[str]) -> None:
    import httpx

    try:
        httpx.head(endpoint, timeout=HUB_SECONDS)
        answers.append("")
    except Exception as error:
        answers.append(str(error) or type(error).__name__)
