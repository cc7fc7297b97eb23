"""Where the checkout and its configuration are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
SOKOBAN = str(ROOT / "configs" / "sokoban.toml")
