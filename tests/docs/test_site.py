"""The site of the documents: every page is in it, it builds strictly and loads nothing foreign."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.paths import ROOT

REASON = "mkdocs-material is not installed: pip install 'minidistill[docs]'"
FOREIGN = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="(?:https?:)?//')


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"([\w./-]+\.md)\b", nav)
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert sorted(named) == sorted([*pages, "index.md", "decisions/index.md"])


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"(?m)^- \[(\d{4})\]\(([^)]+)\): (.+)$", (folder / "index.md").read_text())
    titles = [
        (path.name[:4], path.name, path.read_text().splitlines()[0].removeprefix("# "))
        for path in sorted(folder.glob("0*.md"))
    ]
    assert listed == titles


@pytest.mark.skipif(find_spec("material") is None or find_spec("mkdocs") is None, reason=REASON)
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not FOREIGN.search(page.read_text(encoding="utf-8")), page
    assert "gap closed" in (tmp_path / "index.html").read_text(encoding="utf-8")
