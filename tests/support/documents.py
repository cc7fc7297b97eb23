"""The documents as a reader's programs see them: code blocks, anchors and links."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.M)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^()\s]+)(?: +\"[^\"]*\")?\)")
_CODE = re.compile(r"`[^`\n]*`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """`docs/tutorial.md:12`, for a test's name and its message."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """README.md and the pages of docs/, without the decisions."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def all_documents() -> list[Path]:
    """Every Markdown file that a reader of the repository meets."""
    folders = ("docs", "kernels", "minidistill", "bench", "configs")
    found = {ROOT / "README.md", ROOT / "AGENTS.md"}
    for folder in folders:
        found.update((ROOT / folder).rglob("*.md"))
    return sorted(found)


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document in their order, or those of one language."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        indent = len(match["indent"])
        code = "".join(part[indent:] or "\n" for part in match["text"].splitlines(keepends=True))
        found.append(Block(document, line, match["language"], code))
    return [block for block in found if language in (None, block.language)]


def prose(document: Path) -> str:
    """A document's text; fenced blocks are blank lines, so that lines keep their numbers."""
    text = document.read_text(encoding="utf-8")
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def anchors(document: Path) -> set[str]:
    """What `#…` may name in a document, as GitHub makes it of the headings."""
    slugs: Counter[str] = Counter()
    found = set()
    for heading in _HEADING.findall(prose(document)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


def links(document: Path) -> list[tuple[int, str]]:
    """The line and the target of each link and picture outside code."""
    text = _CODE.sub(lambda match: "x" * len(match[0]), prose(document))
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in _LINK.finditer(text)]
