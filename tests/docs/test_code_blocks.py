"""Every fenced block of the documents is run, or checked as far as it can be without a GPU."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL
from support.documented_commands import check_command, command_lines
from support.documents import Block, blocks, documents, prose
from support.paths import ROOT

from minidistill import cli
from minidistill.config import load_config, shipped
from minidistill.errors import EXIT_OK, UserError

BLOCKS = [block for document in documents() for block in blocks(document)]
RUN_ELSEWHERE = {"docs/notebook.md": "tests/api/test_notebook.py"}
"""Documents whose Python is a whole session, and the test that runs it."""
PLACEHOLDER = re.compile(r"\b(?:[A-Z]{3,}BLOCK|TODO|FIXME|TBD|XXX)\b")
QUICK = ("config", "plan")
"""Commands that run here as they are written: they load no weights."""


def of(language: str) -> list[Any]:
    """The parameters of a test: the blocks of a language, named by where they stand."""
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.language == language]


def test_every_block_says_what_it_is() -> None:
    known = {"bash", "toml", "python", "json", "jsonl", "text"}
    assert [block.place for block in BLOCKS if block.language not in known] == []


def test_nothing_is_left_to_fill_in() -> None:
    for document in documents():
        assert not PLACEHOLDER.search(document.read_text()), document.name


def test_no_code_is_indented_instead_of_fenced() -> None:
    for document in documents():
        lines = prose(document).splitlines()
        indented = [
            number
            for number, (before, line) in enumerate(pairwise(lines), start=2)
            if line.startswith("    ") and (not before.strip() or before.startswith("#"))
        ]
        assert not indented, f"{document.name}: fence the code in lines {indented}"


@pytest.mark.parametrize("block", of("toml"))
def test_a_configuration_loads(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole configuration alone, a part of one after the smallest that loads."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'\b(?:context_file|chat_template) = "([^"]+)"', block.text):
        Path(name).write_text("Be brief.")
    Path("block.toml").write_text(block.text)
    if block.text.startswith("max_steps"):  # it is meant to be complete
        load_config(["block.toml"])
        return
    data = tomllib.loads(block.text)
    pure = data.get("orchestrator", {}).get("buffer", {}).get("skip_verification", False)
    Path("minimal.toml").write_text(MINIMAL + ("[trainer.loss]\nadv_tau = 0\n" if pure else ""))
    load_config(["minimal.toml", "block.toml"])


def _is_there(name: str) -> bool:
    return Path(name).exists() or name in shipped.names()


@pytest.mark.parametrize("block", of("bash"))
def test_commands_can_be_run(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    lines = list(command_lines(block.text))
    assert lines
    for words in lines:
        check_command(words, tmp_path)
        if words[0] == "minidistill" and words[1] in QUICK and _is_there(words[2]):
            assert cli.main(words[1:]) == EXIT_OK, capsys.readouterr().err


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(block.text, block.place, "exec")
    name = str(block.document.relative_to(ROOT))
    if name in RUN_ELSEWHERE:
        assert Path(name).name in (ROOT / RUN_ELSEWHERE[name]).read_text()
        return
    monkeypatch.chdir(ROOT)
    exec(code, {"__name__": "__main__"})


def test_json_is_json() -> None:
    for block in BLOCKS:
        whole = {"json": [block.text], "jsonl": block.text.splitlines()}
        for text in whole.get(block.language, []):
            json.loads(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("minidistill run configs/sokoban.toml --trainer.optim.lrr 1", "lrr"),
        ("minidistill run configs/none.yaml", "none.yaml"),
        ("minidistill export runs/mine --into x", "--into"),
        ("minidistill brew runs/mine", "brew"),
        ("make cofee", "cofee"),
        ("pip install 'minidistill[cuda]'", "cuda"),
        ("python -m bench.none", "bench.none"),
        ("frobnicate --all", "frobnicate"),
        ("ls && torchrun --nnodes 2 -m minidistill run my.toml --nope 1", "ls"),
    ],
)
def test_the_check_sees_a_wrong_command(text: str, words: str, tmp_path: Path) -> None:
    def check() -> None:
        for line in command_lines(text):
            check_command(line, tmp_path)

    with pytest.raises((AssertionError, UserError), match=re.escape(words)):
        check()
