"""Each row of docs/migration.md against the real schema and the real refusals."""

from __future__ import annotations

import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from support.configs import MINIMAL
from support.paths import ROOT

from minidistill.config import load_config, schema_tree
from minidistill.config.prime_rl import _KEYS
from minidistill.envs.jsonl.env import load as load_jsonl
from minidistill.errors import UserError

DOCUMENT = (ROOT / "docs" / "migration.md").read_text()
SECTIONS = re.split(r"(?m)^## ", DOCUMENT)[1:]
KEY = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*")


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its header."""
    cells = re.findall(r"(?m)^\| (.*) \|$", section)
    return [row.split(" | ") for row in cells[1:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def exists(key: str) -> bool:
    """Whether the schema has a setting, or a table, of that dotted name."""
    node: schema_tree.Node | None = schema_tree.root()
    for part in key.split("."):
        node = None if node is None else schema_tree.child(node, part)
        if node is not None and "array" in schema_tree.kinds(node):
            node = schema_tree.child(node, 0) or node
    return node is not None


def load(text: str, folder: Path) -> None:
    """Load a setting `a.b.c = value` on top of the smallest configuration."""
    (folder / "minimal.toml").write_text(MINIMAL + "[orchestrator.eval]\n")
    (folder / "setting.toml").write_text(text)
    load_config([str(folder / "minimal.toml"), str(folder / "setting.toml")])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0])
def test_every_setting_of_ours_exists(section: str, tmp_path: Path) -> None:
    table = rows(section)
    assert len(table) >= 7
    arguments = inspect.signature(load_jsonl).parameters
    named = 0
    for row in table:
        for name in quoted(row[1]):
            key, _, value = name.partition(" = ")
            if KEY.fullmatch(key) is None or key in ("context", "id"):
                continue
            named += 1
            if key.startswith("args."):
                assert key.removeprefix("args.") in arguments, row
            elif not key.startswith("perf/"):
                assert exists(key), f"{key} is not a setting: {row}"
            if value:
                load(name, tmp_path)
    assert named >= 3


def test_keys_of_the_public_trainer_that_are_the_same() -> None:
    same = [
        key for row in rows(SECTIONS[0]) if row[1].startswith("the same") for key in quoted(row[0])
    ]
    assert len(same) > 30
    assert [key for key in same if not exists(key)] == []


def test_other_keys_of_the_public_trainer_are_refused_with_what_the_table_says(
    tmp_path: Path,
) -> None:
    others = [row for row in rows(SECTIONS[0]) if not row[1].startswith("the same")]
    for row in others:
        for key in quoted(row[0]):
            with pytest.raises(UserError) as refusal:
                load(f"{key} = 1", tmp_path)
            for name in quoted(row[1]):
                if KEY.fullmatch(name) and exists(name):
                    assert name in str(refusal.value), (key, name)


def test_every_refusal_with_a_fix_is_in_the_table() -> None:
    keys = [key for row in rows(SECTIONS[0]) for key in quoted(row[0])]
    missing = [p for p in _KEYS if not any(fnmatchcase(key, p) for key in keys)]
    assert missing == []
