"""`python -m bench.growth`: the points, the models of other vocabularies, and the plot."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench import growth, growth_point
from bench.growth_plot import LINES, svg
from bench.step_pieces import PIECES
from bench.workload import Case
from minidistill.errors import EXIT_FAILED, UserError

CASE = Case("tiny-sokoban", context=24, prompt=8, batch=2, completion=4)


def point(scale: float) -> dict[str, Any]:
    pieces = {name: scale * (i + 1) for i, name in enumerate(PIECES)}
    return {
        "pieces": pieces,
        "step": sum(pieces.values()),
        "training": scale,
        "peak_gib": 1.0,
        "first_step": 1.0,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    points = {"128": point(1), "512": point(1.1), "2048": point(1.25)}
    return {"context": {"points": points}, "group": {"points": {"1": point(4), "8": point(1)}}}


def test_each_point_is_a_case() -> None:
    for name in set(growth.SWEEPS) - {"vocabulary"}:
        values = growth.SWEEPS[name].values
        cases = dict(growth.cases("tiny-sokoban", name, Path()))
        assert tuple(cases) == values
        assert all(getattr(case, name) == value for value, case in cases.items())


def test_a_point_is_a_step_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    growth_point.main(CASE, 1, time.perf_counter)
    measured = json.loads(capsys.readouterr().out)
    assert sum(measured["pieces"].values()) == pytest.approx(measured["step"])
    assert measured["pieces"]["score"] < measured["training"] < measured["step"]
    assert 0.05 < measured["peak_gib"] < 64
    growth.show("context", 24, measured)
    assert "context     24: step" in capsys.readouterr().out


def interpreter(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let this shell script stand for Python."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_point_is_measured_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter(
        tmp_path, monkeypatch, """echo "$@" > arguments; echo a greeting; echo '{"step": 2}'"""
    )
    monkeypatch.setattr(growth, "ROOT", tmp_path)
    assert growth.measure(CASE, 3, 2, "cpu") == {"step": 2}
    words = (tmp_path / "arguments").read_text().split()
    assert words[:2] == ["-m", "bench.growth_point"]
    assert words[-3:] == ["3", "2", "cpu"]
    assert Case(**json.loads(" ".join(words[2:-3]))) == CASE


def test_a_point_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter(tmp_path, monkeypatch, "echo no room for 5000 tokens >&2; exit 3")
    with pytest.raises(UserError, match="no room for 5000 tokens") as error:
        growth.measure(CASE, 1, 1, "wall")
    assert error.value.exit_code == EXIT_FAILED


def test_the_growth_of_scoring_is_a_ratio(report: dict[str, Any]) -> None:
    assert growth.scoring_growth(report["context"]["points"]) == 1.25


def test_a_larger_vocabulary_has_random_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from minidistill.models.registry import resolve

    folder = growth.with_vocabulary("tiny-sokoban", 1000, tmp_path / "larger")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight
        for path in (resolve("tiny-sokoban"), folder)
    )
    assert after.shape == (1000, before.shape[1])
    assert torch.equal(after[: len(before)], before)
    assert after[len(before) :].std() > 0
    assert growth.with_vocabulary("tiny-sokoban", len(before), tmp_path) == "tiny-sokoban"
    with pytest.raises(UserError, match="more than 10"):
        growth.with_vocabulary("tiny-sokoban", 10, tmp_path)


def test_the_plot_has_a_panel_for_each_sweep(report: dict[str, Any]) -> None:
    root = ElementTree.fromstring(svg(report))
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}g")
    assert [panel.find(f"{space}text").text for panel in panels] == ["context", "group"]
    for panel, count in zip(panels, (3, 2), strict=True):
        lines = panel.findall(f"{space}polyline")
        assert len(lines) == len(LINES)
        assert all(len(line.get("points", "").split()) == count for line in lines)
        for line in lines:  # nothing is outside of its panel
            places = [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
            assert all(40 <= x <= 230 and 28 <= y <= 158 for x, y in places)


def test_results_are_saved_after_each_sweep(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "RESULTS", tmp_path)
    monkeypatch.setattr(growth, "measure", lambda case, *settings: point(case.context))
    assert growth.main(["--model", "tiny", "--only", "context", "--only", "batch"]) == 0
    saved = json.loads((tmp_path / "growth.json").read_text())
    assert saved["scoring_growth"] == 16.0
    assert list(saved["batch"]["points"]) == ["4", "8", "16", "32"]
    assert (tmp_path / "growth.svg").read_text() == svg(saved)


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--only", "nothing"])
    assert growth.main(["--model", "/no/such/model"]) == 2
    assert "--model" in capsys.readouterr().err
