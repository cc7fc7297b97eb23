"""The tutorial's commands, in their order, on a model that is small enough for a test."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from support.documented_commands import command_lines
from support.documents import blocks
from support.paths import ROOT

from minidistill import cli
from minidistill.errors import EXIT_OK

TUTORIAL = ROOT / "docs" / "tutorial.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = [
    *("--orchestrator.batch_size", "2", "--orchestrator.rollouts_per_example", "1"),
    *("--orchestrator.sampling.max_tokens", "4", "--orchestrator.eval.num_examples", "8"),
    *("--trainer.model.lora.rank", "2"),
]
IN_PLACE = {
    "bake": ["--steps", "1", "--prompts", "questions.txt", *SMALL],
    "run": ["--max_steps", "1", *SMALL],
    "export": ["--no-vllm"],
    "eval": ["--n", "8"],
}
"""What makes a command quick. The shipped model plays Sokoban: it writes no questions."""


def test_the_commands_work_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the sea?\n"))
    [persona] = [block.text for block in blocks(TUTORIAL, "text") if "Flint" in block.text]
    Path("persona.txt").write_text(persona)
    Path("questions.txt").write_text("".join(f"What is number {n}?\n" for n in range(40)))
    lines = [words for block in blocks(TUTORIAL, "bash") for words in command_lines(block.text)]
    done = []
    for program, *args in lines:
        if program != "minidistill":
            continue
        args = ["tiny-sokoban" if arg == MODEL else arg for arg in args]
        code = cli.main([*args, *IN_PLACE.get(args[0], [])])
        output = capsys.readouterr()
        assert code == EXIT_OK, (args, output.err)
        done.append(args[0])
    assert {"bake", "report", "rollouts", "chat", "config", "run", "eval", "export"} == set(done)
    assert Path("runs/pirate/report.html").is_file()
    assert Path("pirate/adapter_model.safetensors").is_file()
    assert Path("pirate-merged/model.safetensors").is_file()
