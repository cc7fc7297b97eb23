"""Fixtures of conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.conversations import STEP, Stage

from minidistill.envs.isolated import close_environments

Configure = Callable[..., Any]


@pytest.fixture
def staged(configure: Configure) -> Any:
    stages: list[Stage] = []

    def make(*flags: str, **options: Any) -> Stage:
        stages.append(Stage(configure(*STEP, *flags), **options))
        return stages[-1]

    yield make
    for stage in stages:
        close_environments(stage.environments.values())
