"""The tables of docs/security.md and docs/reliability.md name tests that exist."""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT, TESTS

NAMED = re.compile(r"`([a-z0-9_/]+\.py)::(\w+)`")
ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)


def rows(document: str) -> list[list[str]]:
    """The cells of all rows but headers."""
    text = (ROOT / "docs" / document).read_text()
    split = [[cell.strip() for cell in row.split(" | ")] for row in ROW.findall(text)]
    return [row for row in split if not row[0].startswith("---") and row[-1] != "test"]


@pytest.mark.parametrize("document", ["security.md", "reliability.md"])
def test_each_row_names_tests_that_exist(document: str) -> None:
    for row in rows(document):
        named = NAMED.findall(row[-1])
        assert named, row
        for file, test in named:
            source = (TESTS / file).read_text()
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"


def test_the_table_of_faults_is_complete() -> None:
    faults = rows("reliability.md")
    assert len({row[0] for row in faults}) == len(faults) >= 45
    assert {len(row) for row in faults} == {6}


def test_the_readme_names_both() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "(docs/security.md)" in readme
    assert "(docs/reliability.md)" in readme
