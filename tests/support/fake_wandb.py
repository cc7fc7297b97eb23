"""A package in place of wandb that misbehaves: FAKE_WANDB is "place:fault", or is empty."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any

from minidistill.reporting.monitors import background

RELEASE = threading.Event()
"""Hanging threads wait for it."""


def misbehave(here: str) -> None:
    place, _, fault = os.environ.get("FAKE_WANDB", "").partition(":")
    if place != here:
        return
    if fault.startswith("hang"):
        RELEASE.wait(60)
    elif fault == "raise":
        raise RuntimeError("broken")
    elif fault == "exit":
        sys.exit(3)
    elif fault == "interrupt":
        raise KeyboardInterrupt


if os.environ.get("FAKE_WANDB", "").endswith("exit hook"):  # in a process of the test's own
    background.CLOSE_SECONDS = 0.2
    atexit.register(RELEASE.wait)


class Settings:
    model_fields: tuple[str, ...] = ()

    def __init__(self, **fields: Any) -> None:
        self.fields = fields


class _Run:
    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, **settings: Any) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None:
        misbehave("log")

    def finish(self) -> None:
        misbehave("finish")


class Table:
    def __init__(self, columns: list[str], data: list[list[str]]) -> None: ...


def setup(settings: Settings) -> None: ...


def login(prompt: bool = True, verify: bool = True) -> bool:
    misbehave("key")
    return os.environ.get("FAKE_WANDB") != "key:none"


def init(**settings: Any) -> _Run:
    misbehave("init")
    return _Run()
