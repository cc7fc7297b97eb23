"""The end of a run: what is on disk when its last passes fail, and how a resume completes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.runs import board, records, run

from minidistill.driver import session
from minidistill.errors import EXIT_FAILED, EXIT_OK

BRIEF = ("--max_steps", "2")
ADAPTER = Path("adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run(path, *BRIEF) == EXIT_OK
    return path


def failing(*args: Any) -> Any:
    raise RuntimeError("it broke")


FIGURES = ["heldout_kl_after", "drift_kl", "unrelated_kl_after"]
DERIVED = ("heldout_kl_closed", "unrelated_kl_closed")
"""Prefixes of figures that are computed from those."""


@pytest.mark.parametrize("name", ["held_out_kl", "drift_kl", "unrelated_kl"])
def test_the_adapter_and_a_scoreboard_are_safe_and_a_resume_completes_them(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    path = tmp_path / "run"
    missing = FIGURES[["held_out_kl", "drift_kl", "unrelated_kl"].index(name) :]
    calls: list[Any] = []
    original = getattr(session.Session, name)

    def fails_at_the_end(self: session.Session) -> Any:
        calls.append(name)
        before_training = name != "drift_kl" and len(calls) == 1
        return original(self) if before_training else failing()

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, name, fails_at_the_end)
        assert run(path, *BRIEF) == EXIT_FAILED
    output = capsys.readouterr().out
    assert f"scoreboard.json lacks {' and '.join(missing)}, which --resume computes" in output
    ours, theirs = load_file(path / ADAPTER), load_file(whole / ADAPTER)
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    incomplete, complete = board(path), board(whole)
    assert incomplete.pop("missing") == missing
    later = (*missing, *DERIVED, "completions", "drift_verdict")
    for key in complete:
        assert key.startswith(later) or incomplete[key] == complete[key], key
    assert all(incomplete[key] is None for key in missing)
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    assert board(path) == complete
    assert "missing" not in complete
    assert records(path) == records(whole)
    assert (path / "report.html").exists()
