"""A run's records, for the tests of what they hold and of what is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.recorded_run import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes most of the time
    return Run(tmp_path / "run")
