"""What other people's code changes of torch's state has no effect on a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import board, records, run
from support.torch_settings import meddle

from minidistill.errors import EXIT_OK
from minidistill.system import torch_state
from minidistill.system.foreign import foreign_code

MEDDLING = ("--orchestrator.env.0.id", "support.torch_settings:load")
SHORT = ("--max_steps", "2", "--orchestrator.env.0.name", "sokoban")
DROPOUT = ("--trainer.model.lora.dropout", "0.1")


def state() -> tuple[Any, ...]:
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch_state, "_said", set())
    before = state()
    yield
    after = state()
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    torch.set_num_threads(before[2])
    assert after == before


def test_a_run_is_the_same_with_an_environment_that_changes_torchs_state(
    tmp_path: Path,
) -> None:
    """Where it is loaded, where its tasks are read, and in each score."""
    for meddles in ("true", "false"):
        settings = (*SHORT, *DROPOUT, *MEDDLING, "--orchestrator.env.0.args.meddles", meddles)
        assert run(tmp_path / meddles, *settings) == EXIT_OK
        said = (tmp_path / meddles / "logs/run.log").read_text().count("changed torch's")
        assert said == (3 if meddles == "true" else 0)
    assert records(tmp_path / "true") == records(tmp_path / "false")
    assert board(tmp_path / "true") == board(tmp_path / "false")


def test_a_change_is_set_back_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    before = state()
    for _ in range(2):
        with foreign_code(lambda error: ValueError()):
            meddle()
        assert state() == before

    def fail() -> None:
        meddle()
        raise KeyError

    with pytest.raises(ValueError, match="ours"), foreign_code(lambda error: ValueError("ours")):
        fail()
    assert state() == before
    assert [text.partition(" to ")[0] for text in caplog.messages] == [
        f"code of an environment, a model or a monitor changed torch's {name} from {value}"
        for name, value in zip(
            ("default dtype", "recording of gradients", "number of threads"), before, strict=True
        )
    ]


def test_another_thread_does_not_undo_what_the_main_one_does() -> None:
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with foreign_code(lambda error: ValueError()):
            entered.set()
            leave.wait()

    before = torch.get_default_dtype()
    thread = threading.Thread(target=call)
    thread.start()
    entered.wait()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads a model
    leave.set()
    thread.join()
    try:
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(before)
