"""The smallest configuration that loads."""

from __future__ import annotations

MINIMAL = """\
[orchestrator.teacher_model]
context = "Think."
[[orchestrator.env]]
id = "sokoban-env"
"""
