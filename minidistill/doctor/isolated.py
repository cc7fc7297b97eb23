"""A check in a process of its own: a crash or a hang is that check's failure, and no more."""

from __future__ import annotations

import json
import os
from subprocess import TimeoutExpired

from minidistill.doctor.catalog import Check
from minidistill.doctor.result import Result, failed
from minidistill.system.subprocesses import Subprocess

LONGEST = 1 << 16
"""Bytes of a result: less than a pipe holds."""


def make(check: Check) -> Result:
    """Make a check and return what it found."""
    reading, writing = os.pipe()
    try:
        process = Subprocess(
            "minidistill.doctor.probe",
            [check.name, str(writing)],
            [writing],
            check.environment,
        )
        try:
            return _wait(check, process, reading)
        finally:
            process.close()
    finally:
        os.close(reading)
        os.close(writing)


def _wait(check: Check, process: Subprocess, reading: int) -> Result:
    try:
        code = process.popen.wait(timeout=check.seconds)
    except TimeoutExpired:
        said = process.last_words()
        return failed(f"no answer within {check.seconds:g} s{said}", check.fix)
    os.set_blocking(reading, False)
    try:
        answer = json.loads(os.read(reading, LONGEST))
    except (BlockingIOError, ValueError):  # nothing, or half of it
        answer = None
    if code != 0 or answer is None:
        return failed(f"it crashed: {process.exit_report()[1]}", check.fix)
    return Result(**answer)
