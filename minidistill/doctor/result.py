"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """`text` says what is there, `fix` what to do about it; a check that passes needs none."""

    status: Status
    text: str
    fix: str = ""


def passed(text: str) -> Result:
    return Result("pass", text)


def failed(text: str, fix: str) -> Result:
    return Result("fail", text, fix)


def skipped(text: str, fix: str = "") -> Result:
    """The check does not apply here, or is about something that a run can do without."""
    return Result("skipped", text, fix)
