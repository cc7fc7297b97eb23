"""The `config` command: values and their origins, as text, JSON and a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.configs import MINIMAL

from minidistill import cli


def test_an_error_is_printed_as_what_where_fix(
    minimal_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(minimal_config).write_text("max_step = 5\n" + MINIMAL)
    assert cli.main(["config", minimal_config]) == 2
    assert capsys.readouterr().err == (
        "error: there is no max_step = 5\n"
        f"  where: {minimal_config}:1, max_step\n"
        "  fix: did you mean `max_steps`?\n"
    )


def test_values_and_their_origins_are_printed(
    minimal_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", minimal_config, "--trainer.optim.lr", "2e-3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainer.optim.lr", "0.002", "--trainer.optim.lr"] in rows
    assert ["seed", "0", "default"] in rows
    assert ["orchestrator.env.0.id", '"sokoban-env"', f"{minimal_config}:4"] in rows


def test_json_output(minimal_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", minimal_config, "--json", "--orchestrator.env.0.args.x", "inf"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["config"]["orchestrator"]["env"][0]["args"] == {"x": "Infinity"}
    assert printed["provenance"]["orchestrator.teacher_model.context"] == f"{minimal_config}:2"


def test_a_terminal_gets_a_table_that_shows_markup_as_text(
    minimal_config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["config", minimal_config, "--model.name", "[red]x"]) == 0
    out = capsys.readouterr().out
    assert '"[red]x"' in out
    assert "setting" in out
