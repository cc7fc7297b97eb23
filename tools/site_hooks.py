"""What mkdocs does not do by itself: the README is the first page, and links may leave docs/.

The documents are written for the repository, where they link to configurations, results and model
cards too. The site has copies of the files that are linked, so that it works alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "repository"
"""The folder of the site with the linked files that are not in docs/."""
_LINK = re.compile(r"(\]\()([^()\s#]+)((?:#[^()\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and every file outside docs/ that a page links to."""
    waiting = [ROOT / "README.md", *DOCS.rglob("*.md")]
    seen = set(waiting)
    for source in waiting:  # which grows
        if not source.is_relative_to(DOCS):
            content = source.read_bytes()
            files.append(File.generated(config, site_path(source), content=content))
        if source.suffix == ".md":
            linked = {target for _, target in _targets(source) if target.is_file()}
            waiting += sorted(path for path in linked - seen if not path.is_relative_to(DOCS))
            seen |= linked
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where their files are in the site."""
    name = page.file.src_uri
    source = ROOT / name.removeprefix(f"{OUTSIDE}/") if name.startswith(OUTSIDE) else DOCS / name
    if name == "index.md":
        source = ROOT / "README.md"
    moved = {link: site_path(target) for link, target in _targets(source) if target.is_file()}

    def lead(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if link in moved:
            link = os.path.relpath(moved[link], os.path.dirname(name) or ".")
        return f"{before}{link}{after}"

    return _LINK.sub(lead, markdown)


def site_path(source: Path) -> str:
    """Where a file of the repository is in the site, below `docs_dir`."""
    if source == ROOT / "README.md":
        return "index.md"
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{source.relative_to(ROOT).as_posix()}"


def _targets(document: Path) -> list[tuple[str, Path]]:
    """The links of a document to files, and what they lead to in the repository."""
    found = []
    for _, link, _ in _LINK.findall(document.read_text(encoding="utf-8")):
        target = Path(os.path.normpath(document.parent / link))
        if "://" not in link and target.is_relative_to(ROOT):
            found.append((link, target))
    return found
