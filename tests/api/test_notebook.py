"""The session of docs/notebook.md, executed as a notebook does it: one block after the other."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "docs" / "notebook.md").read_text())


def execute(block: str, names: dict[str, Any]) -> Any:
    """Run a block. Returns the value of its last line, which a notebook would show."""
    tree = ast.parse(block)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "notebook.md", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "notebook.md", "eval"), names)


def test_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    values = [execute(block, names) for block in BLOCKS]
    assert len(BLOCKS) == 11
    assert values[1] == (0.2, "Python")
    assert values[2].verdict in values[2]._repr_html_()
    assert len(values[3]) == 6
    assert values[4] == ("finished", values[4][1], 6)
    assert values[5][2] > values[5][0], "in context the model plays better"
    assert values[7]
    assert (values[8] / "adapter_config.json").is_file()
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= set(values[9])
    assert "did you mean `max_steps`?" in capsys.readouterr().out
