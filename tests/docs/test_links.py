"""Links in the documents lead to files that exist and to headings that are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.documents import all_documents, anchors, blocks, links
from support.paths import ROOT


def broken(document: Path) -> list[str]:
    """What is wrong with each link of a document that does not lead anywhere."""
    problems = []
    for line, target in links(document):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = Path(os.path.normpath(document.parent / name)) if name else document
        if not file.is_relative_to(ROOT) or not file.exists():
            problems.append(f"{document.name}:{line}: there is no {target}")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            problems.append(f"{document.name}:{line}: {name} has no heading #{anchor}")
    return problems


@pytest.mark.parametrize("document", all_documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken(document)


def test_the_checker_sees_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.md").write_text("# A heading: `code` & more\n## Twice\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#a-heading-code--more) [c](there.md#twice-1)\n"
        "[d](gone.md) ![e](gone.png)\n`[f](code.md)`\n\n"
        "```text\n[g](block.md)\n```\n[h](there.md#twice-2) [i](../outside.md) [j](#none)\n"
    )
    monkeypatch.setitem(broken.__globals__, "ROOT", tmp_path)
    assert broken(page) == [
        "page.md:2: there is no gone.md",
        "page.md:2: there is no gone.png",
        "page.md:8: there.md has no heading #twice-2",
        "page.md:8: there is no ../outside.md",
        "page.md:8:  has no heading #none",
    ]


def test_fenced_blocks_are_balanced() -> None:
    for document in all_documents():
        fences = [
            line for line in document.read_text().splitlines() if line.strip().startswith("```")
        ]
        assert len(fences) == 2 * len(blocks(document)), document
