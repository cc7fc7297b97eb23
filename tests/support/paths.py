"""Paths of the checkout, its tests and the shipped configuration."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SOKOBAN = str(ROOT / "configs" / "sokoban.toml")
