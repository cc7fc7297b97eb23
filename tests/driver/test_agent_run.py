"""Whole runs of programs: records, Ctrl-C, and the check before a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.agents import SECRET, agent, questions
from support.processes import MARK, left_behind, marked, new_mark, wait_for
from support.runs import board, records, run, start

from minidistill import cli
from minidistill.errors import EXIT_INTERRUPTED, EXIT_OK

RUN = (
    "--orchestrator.batch_size", "4", "--orchestrator.rollouts_per_example", "1",
    "--orchestrator.eval.num_examples", "1", "--orchestrator.eval.interval", "0",
    "--orchestrator.sampling.max_tokens", "8", "--trainer.scheduler.type", "constant",
    "--orchestrator.teacher_model.context", "",
)  # fmt: skip


def rows(path: Path, step: int) -> list[dict[str, Any]]:
    lines = (path / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_of_programs_needs_no_context(tmp_path: Path) -> None:
    path, flags = tmp_path / "run", (*agent(tmp_path, *questions(8, turns=2)), *RUN)
    assert run(path, *flags, "--max_steps", "2") == EXIT_OK
    for row in (*rows(path, 1), *rows(path, 2)):
        assert SECRET not in row["prompt_text"]
        assert row["teacher_prompt_text"].count(SECRET) == 1
        assert "Solve this puzzle." in row["prompt_text"]
    steps = [record for record in records(path) if "turns/mean" in record]
    assert [record["turns/mean"] for record in steps] == [2.0, 2.0]
    scores = board(path)
    assert scores["heldout_kl_after"] is not None
    assert scores["unrelated_kl_after"] is None
    # what is shown side by side answers the program's own request
    [shown] = json.loads((path / "baseline.json").read_text())["completions"]
    assert shown["prompt"] == "Solve this."


def test_ctrl_c_leaves_no_program(tmp_path: Path) -> None:
    mark = new_mark()
    flags = (*agent(tmp_path, *questions(8, do="hang"), env=[MARK]), *RUN, "--no-orchestrator.eval",
        "--orchestrator.teacher_model.eval_baseline", "false")  # fmt: skip
    process = start(tmp_path / "run", *flags, MINIDISTILL_MARK=mark)

    def programs() -> list[str]:
        return [text for text in marked(mark).values() if "agent_program" in text]

    wait_for(lambda: len(programs()) >= 8)  # four, each with its supervisor
    os.kill(process.pid, signal.SIGINT)  # ends the run after the step
    os.kill(process.pid, signal.SIGTERM)  # and now
    assert process.wait() == EXIT_INTERRUPTED
    assert not left_behind(mark)


def test_env_check_shows_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = agent(tmp_path, *questions(4))[-2:]
    assert cli.main(["env", "check", "configs/sokoban.toml", *flags]) == EXIT_OK
    shown = capsys.readouterr().out
    assert "its first request came after" in shown
    assert "the teacher reads the system message of its first request" in shown
